"""How far the policy is from a reference model."""

from __future__ import annotations

from typing import Any

import torch

from megatron_gpc.algo.losses.ratio import MAX_LOG_RATIO, log_ratio


def k3(logp_T: torch.Tensor, reference_logp_T: torch.Tensor) -> torch.Tensor:
    """r - 1 - ln r with r = p_reference / p, for each token [T]; gradient flows through logp_T.

    Never negative, and its mean over tokens sampled from p is KL(p, p_reference) (J. Schulman,
    "Approximating KL divergence", 2020).  r is bounded by exp(MAX_LOG_RATIO), in the gradient too.
    Where the reference has p = 0 the divergence is infinite, and its gradient 1 - r = 1 right and
    harmless: the value is a large number instead, so that the other tokens are trained on.
    """
    return _K3.apply(logp_T, reference_logp_T)


class _K3(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logp_T: torch.Tensor, reference_logp_T: torch.Tensor) -> torch.Tensor:
        log_r_T = log_ratio(reference_logp_T, logp_T).clamp(max=MAX_LOG_RATIO)
        above_one_T = torch.expm1(log_r_T)  # r - 1
        ctx.save_for_backward(above_one_T)
        return above_one_T - log_r_T

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        (above_one_T,) = ctx.saved_tensors
        return -grads[0] * above_one_T, None
