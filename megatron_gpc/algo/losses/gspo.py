"""GSPO: the importance ratio of a whole sequence (arXiv 2507.18071)."""

from __future__ import annotations

from typing import Literal

import torch

from megatron_gpc.algo.losses.clip import clipped_surrogate
from megatron_gpc.algo.losses.interface import LossInputs, LossOutputs
from megatron_gpc.algo.losses.ratio import importance_ratio, log_ratio
from megatron_gpc.config.types import PositiveFloat, PositiveShare, section


@section
class GSPO:
    """-mean over sequences of min(s A, clip(s, 1 - eps_low, 1 + eps_high) A), where

        s = (p(sequence) / q(sequence))^(1 / length) = exp(mean over its tokens of ln p_t - ln q_t)

    The clip section's thresholds are for tokens' ratios and play no part.
    """

    eps_low: PositiveShare = 3e-4
    """How far below 1 a sequence's ratio may go."""
    eps_high: PositiveFloat = 4e-4
    """How far above 1 it may go."""
    average: Literal["sequence", "token"] = "sequence"
    """Whether all sequences weigh the same, as in the paper, or all tokens, as in `clip`."""

    def __call__(self, inputs: LossInputs) -> LossOutputs:
        logp_T, old_logp_T = inputs.logp_T.detach(), inputs.streams.old_logp_T
        log_s_T = inputs.sequence_mean(log_ratio(logp_T, old_logp_T))
        # Equation 14, GSPO-token: in value s, in gradient s grad ln p_t.  Summed over a sequence's
        # tokens and divided by their number this is the gradient of s, and none of it has to come
        # from tokens that other ranks hold.
        zero_T = (inputs.logp_T - logp_T).nan_to_num(0.0)
        ratio_T = importance_ratio(log_s_T + zero_T, torch.zeros_like(log_s_T))
        advantages_T = inputs.advantages_T
        if self.average == "sequence":
            advantages_T = advantages_T * inputs.sequence_weight_T
        lower_T = torch.full_like(ratio_T, 1 - self.eps_low)
        upper_T = torch.full_like(ratio_T, 1 + self.eps_high)
        return clipped_surrogate(ratio_T, advantages_T, lower_T, upper_T)
