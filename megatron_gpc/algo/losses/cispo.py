"""CISPO: the importance weight is clipped, no token's gradient is (arXiv 2506.13585)."""

from __future__ import annotations

import torch

from megatron_gpc.algo.clipping import ratio_interval
from megatron_gpc.algo.losses.interface import LossInputs, LossOutputs
from megatron_gpc.algo.losses.ratio import importance_ratio
from megatron_gpc.config.types import PositiveFloat, PositiveShare, section


@section
class CISPO:
    """-sum_t sg(clip(r_t)) A_t ln p_t, with r = p/q and sg for "no gradient" (equation 4)."""

    eps_low: PositiveShare | None = None
    """The weight is at least 1 - eps_low.  Left out, it has no lower limit, as in the paper."""
    eps_high: PositiveFloat | None = None
    """The weight is at most 1 + eps_high.  Left out, the upper threshold of the clip section, which
    its schedule moves."""

    def __call__(self, inputs: LossInputs) -> LossOutputs:
        logp_T = inputs.logp_T.detach()
        ratio_T = importance_ratio(logp_T, inputs.streams.old_logp_T)
        _, upper_T = ratio_interval(inputs.bounds, logp_T.exp())
        if self.eps_high is not None:
            upper_T = torch.full_like(upper_T, 1 + self.eps_high)
        lower = 0.0 if self.eps_low is None else 1 - self.eps_low
        weight_T = ratio_T.clamp(min=lower).minimum(upper_T)
        # ln 0 = -inf times the weight 0 would be no number
        logp_or_lowest_T = inputs.logp_T.clamp(min=torch.finfo(inputs.logp_T.dtype).min)
        return LossOutputs(
            loss_sum=-(weight_T * inputs.advantages_T * logp_or_lowest_T).sum(),
            ratio_T=ratio_T,
            clipped_low_T=ratio_T < lower,
            clipped_high_T=ratio_T > upper_T,
        )
