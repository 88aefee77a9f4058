"""The default objective: PPO's clipped surrogate with thresholds that move."""

from __future__ import annotations

import torch

from megatron_gpc.algo.clipping import ratio_interval
from megatron_gpc.algo.losses.interface import LossInputs, LossOutputs
from megatron_gpc.algo.losses.ratio import importance_ratio


def clip(inputs: LossInputs) -> LossOutputs:
    """-sum_t min(r_t A_t, clip(r_t, lower(p_t), upper(p_t)) A_t), with r = p/q.

    Constant bounds make this PPO (arXiv 1707.06347, equation 7), GRPO and DAPO's clip-higher: there
    is no second code path, and the numbers equal the textbook formula bit for bit.

    They are finite whatever p and q are, 0 included (losses/ratio.py).
    """
    ratio_T = importance_ratio(inputs.logp_T, inputs.streams.old_logp_T)
    lower_T, upper_T = ratio_interval(inputs.bounds, inputs.logp_T.detach().exp())
    return clipped_surrogate(ratio_T, inputs.advantages_T, lower_T, upper_T)


def clipped_surrogate(
    ratio_T: torch.Tensor,
    advantages_T: torch.Tensor,
    lower_T: torch.Tensor,
    upper_T: torch.Tensor,
) -> LossOutputs:
    """-sum_t min(r_t A_t, clip(r_t, lower_t, upper_t) A_t); gradient flows through the ratio."""
    clipped_ratio_T = torch.clamp(ratio_T, lower_T, upper_T)
    loss_sum = -torch.min(ratio_T * advantages_T, clipped_ratio_T * advantages_T).sum()
    ratio_T = ratio_T.detach()
    return LossOutputs(
        loss_sum=loss_sum,
        ratio_T=ratio_T,
        clipped_low_T=(ratio_T < lower_T) & (advantages_T < 0),
        clipped_high_T=(ratio_T > upper_T) & (advantages_T > 0),
    )
