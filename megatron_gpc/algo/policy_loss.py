"""The objective: PPO's clipped surrogate with thresholds that move."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from megatron_gpc.algo.clipping import ratio_interval
from megatron_gpc.types import Bounds


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
    ratio_T = torch.exp(logp_T - old_logp_T)
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
