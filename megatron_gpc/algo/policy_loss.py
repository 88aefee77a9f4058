"""The objective: PPO's clipped surrogate with thresholds that move."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from megatron_gpc.algo.clipping import ratio_interval
from megatron_gpc.types import Bounds

MAX_LOG_RATIO = 30.0
"""Ratios end at exp(30) = 1e13: fp32 overflows from exp(88.8) on, and the squares that a gradient's
norm adds up overflow from 1e19 on."""
IMPOSSIBLE_RATIO = 1e30
"""Of a token with q = 0, which the old policy cannot have drawn.  Finite in loss and gradient, but
with A < 0 the gradient's norm overflows, so that the update is left out (mcore/policy.py)."""


@dataclass(frozen=True)
class PolicyLoss:
    """A sum over tokens, and what each token did."""

    loss_sum: torch.Tensor
    """Scalar; the caller divides by the GLOBAL number of response tokens, once."""
    ratio_T: torch.Tensor
    clipped_low_T: torch.Tensor
    """Tokens whose gradient the lower bound took: A < 0 and ratio below it."""
    clipped_high_T: torch.Tensor
    """Tokens whose gradient the upper bound took: A > 0 and ratio above it."""


def policy_loss(
    logp_T: torch.Tensor,
    old_logp_T: torch.Tensor,
    advantages_T: torch.Tensor,
    bounds: Bounds,
    entropy_T: torch.Tensor | None = None,
    entropy_coef: float = 0.0,
) -> PolicyLoss:
    """-sum_t min(r_t A_t, clip(r_t, lower(p_t), upper(p_t)) A_t), with r = p/q.

    Constant bounds make this PPO (arXiv 1707.06347, equation 7), GRPO and DAPO's clip-higher: there
    is no second code path, and the numbers equal the textbook formula bit for bit.

    They are finite whatever p and q are, 0 included: a ratio beyond exp(MAX_LOG_RATIO) counts as
    that, in the loss and in the gradient; see IMPOSSIBLE_RATIO for q = 0.

    Args:
        logp_T: ln p of the sampled tokens under the policy being trained; gradient flows here.
        old_logp_T: ln q of the same tokens under the old policy, no gradient.
        advantages_T: each token's advantage (its sample's).
        bounds: this training step's thresholds.
        entropy_T: exact entropies; read only where entropy_coef is not 0.
        entropy_coef: weight of an entropy bonus, summed over tokens like the rest.

    Returns:
        The summed loss and per-token diagnostics (no gradient).
    """
    ratio_T = _Ratio.apply(logp_T, old_logp_T)
    lower_T, upper_T = ratio_interval(bounds, logp_T.detach().exp())
    clipped_ratio_T = torch.clamp(ratio_T, lower_T, upper_T)
    loss_sum = -torch.min(ratio_T * advantages_T, clipped_ratio_T * advantages_T).sum()
    if entropy_coef != 0.0:
        assert entropy_T is not None
        loss_sum = loss_sum - entropy_coef * entropy_T.sum()
    ratio_T = ratio_T.detach()
    return PolicyLoss(
        loss_sum=loss_sum,
        ratio_T=ratio_T,
        clipped_low_T=(ratio_T < lower_T) & (advantages_T < 0),
        clipped_high_T=(ratio_T > upper_T) & (advantages_T > 0),
    )


class _Ratio(torch.autograd.Function):
    """p/q of each token, bounded, from ln p and ln q [T]; 1 where they are equal, -inf included.

    Its derivative by ln p is itself, also where it is bounded: a token that ran away with A < 0 is
    still called back.
    """

    @staticmethod
    def forward(ctx: Any, logp_T: torch.Tensor, old_logp_T: torch.Tensor) -> torch.Tensor:
        ratio_T = (logp_T - old_logp_T).clamp(max=MAX_LOG_RATIO).exp()
        ratio_T = ratio_T.where(old_logp_T != -torch.inf, IMPOSSIBLE_RATIO)
        ratio_T = ratio_T.where(logp_T != old_logp_T, 1.0)
        ctx.save_for_backward(ratio_T)
        return ratio_T

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        (ratio_T,) = ctx.saved_tensors
        return grads[0] * ratio_T, None
