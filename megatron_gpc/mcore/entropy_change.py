"""What a training step's updates did to mean entropy, on the step's own samples.

    dh_measured      H(theta') - H(theta)
    dh_directional   <grad H(theta), theta' - theta>
    dh_second_order  <grad H(theta) + grad H(theta'), theta' - theta> / 2

H is the mean exact entropy over the step's response tokens, in their contexts as they were sampled;
theta and theta' are the weights before the step's first and after its last update.  The second is
the exact first-order term of the first: it knows that tokens share parameters and what Adam made of
the gradient, of which the logit-space prediction (algo/regions.py) knows nothing.  The third adds
the second-order term, <theta' - theta, Hessian (theta' - theta)> / 2, without making a Hessian: the
gradients at both ends tell it up to terms of third order.
"""

from __future__ import annotations

from megatron_gpc.mcore.gradients import Vector, gradient, inner_product, weights
from megatron_gpc.mcore.policy import Policy
from megatron_gpc.types import RolloutBatch, TokenStats


class EntropyChange:
    """Is made before a step's updates and asked after them.  Both are collectives.

    Weights are those of the optimizer, fp32; that bf16 models round them is left out.

    Args:
        policy: whose gradient buffers are overwritten.
        batch: the step's rollout.
        scored: what the policy said of it before the updates.
    """

    def __init__(self, policy: Policy, batch: RolloutBatch, scored: TokenStats):
        self.policy, self.batch, self.scored = policy, batch, scored
        self.before = [[weight.detach().clone() for weight in part] for part in weights(policy)]
        self.gradient = self._gradient_of_entropy()

    def metrics(self) -> dict[str, float]:
        """dh_measured, dh_directional and dh_second_order [nats a token], the same on every
        rank."""
        after = self.policy.score(self.batch)
        way = [
            [weight.detach() - before for weight, before in zip(*parts, strict=True)]
            for parts in zip(weights(self.policy), self.before, strict=True)
        ]
        at_start = inner_product(self.policy, self.gradient, way)
        at_end = inner_product(self.policy, self._gradient_of_entropy(), way)
        return {
            "dh_measured": float((after.entropy_T.double() - self.scored.entropy_T).mean()),
            "dh_directional": at_start,
            "dh_second_order": (at_start + at_end) / 2,
        }

    def _gradient_of_entropy(self) -> Vector:
        self.policy.entropy_gradient(self.batch)
        return gradient(self.policy)
