"""What a training step's updates did to mean entropy, on the step's own samples.

    dh_measured     H(theta') - H(theta)
    dh_directional  <grad H(theta), theta' - theta>

H is the mean exact entropy over the step's response tokens, in their contexts as they were sampled;
theta and theta' are the weights before the step's first and after its last update.  The second is
the exact first-order term of the first: it knows that tokens share parameters and what Adam made of
the gradient, of which the logit-space prediction (algo/regions.py) knows nothing.
"""

from __future__ import annotations

from megatron_gpc.mcore.gradients import gradient, inner_product, weights
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
        policy.entropy_gradient(batch)
        self.gradient = gradient(policy)
        self.before = self._along_gradient()

    def metrics(self) -> dict[str, float]:
        """dh_measured and dh_directional [nats a token], the same on every rank."""
        after = self.policy.score(self.batch)
        return {
            "dh_measured": float((after.entropy_T.double() - self.scored.entropy_T).mean()),
            "dh_directional": self._along_gradient() - self.before,
        }

    def _along_gradient(self) -> float:
        """<gradient, weights>: the difference of two of them saves a copy of the weights."""
        return inner_product(self.policy, self.gradient, weights(self.policy))
