"""What a training step's updates did to mean entropy, on the step's own samples.

    dh_measured     H(theta') - H(theta)
    dh_directional  <grad H(theta), theta' - theta>

H is the mean exact entropy over the step's response tokens, in their contexts as they were sampled;
theta and theta' are the weights before the step's first and after its last update.  The second is
the exact first-order term of the first: it knows that tokens share parameters and what Adam made of
the gradient, of which the logit-space prediction (algo/regions.py) knows nothing.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import param_is_not_tensor_parallel_duplicate
from megatron.core.transformer.module import param_is_not_shared

from megatron_gpc.mcore.policy import Policy
from megatron_gpc.mcore.setup import device
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
        policy.optimizer.prepare_grads()
        self.gradient = [
            [p.grad.clone() for p in params if p.grad is not None]
            for params in self._own_parameters()
        ]
        self.before = self._along_gradient()

    def metrics(self) -> dict[str, float]:
        """dh_measured and dh_directional [nats a token], the same on every rank."""
        after = self.policy.score(self.batch)
        return {
            "dh_measured": float((after.entropy_T.double() - self.scored.entropy_T).mean()),
            "dh_directional": self._along_gradient() - self.before,
        }

    def _along_gradient(self) -> float:
        """<gradient, weights> over all ranks.

        float64, so that the difference of two of them is exact enough: it saves a copy of the
        weights.
        """
        total = 0.0
        for optimizer, params, gradients in zip(
            self.policy.optimizer.chained_optimizers,
            self._own_parameters(),
            self.gradient,
            strict=True,
        ):
            found = torch.zeros((), dtype=torch.float64, device=device())
            for param, gradient in zip(params, gradients, strict=True):
                found += torch.dot(gradient.flatten().double(), param.detach().flatten().double())
            dist.all_reduce(found, group=optimizer.get_grad_stats_parallel_group())
            total += float(found)
        return total

    def _own_parameters(self) -> list[list[torch.Tensor]]:
        """Of each optimizer the parameters (or this rank's parts of them) that no other rank of its
        group holds as well: those that megatron-core counts in the gradient's norm."""
        return [
            [
                param
                for param in optimizer.get_parameters()
                if param_is_not_shared(param) and param_is_not_tensor_parallel_duplicate(param)
            ]
            for optimizer in self.policy.optimizer.chained_optimizers
        ]
