"""The importance ratio, finite whatever the log-probs are."""

from __future__ import annotations

from typing import Any

import torch

MAX_LOG_RATIO = 30.0
"""Ratios end at exp(30) = 1e13: fp32 overflows from exp(88.8) on, and the squares that a gradient's
norm adds up overflow from 1e19 on."""
IMPOSSIBLE_RATIO = 1e30
"""Of a token with q = 0, which the old policy cannot have drawn.  Finite in loss and gradient, but
with A < 0 the gradient's norm overflows, so that the update is left out (mcore/policy.py)."""


_ENDLESS = 1e30
"""Stands for an infinite log-ratio, of a token with p = 0 or q = 0."""


def log_ratio(logp_T: torch.Tensor, other_logp_T: torch.Tensor) -> torch.Tensor:
    """ln of p/q of each token, always finite; 0 if they are equal, -inf included."""
    log_ratio_T = (logp_T - other_logp_T).where(logp_T != other_logp_T, 0.0)
    return log_ratio_T.clamp(-_ENDLESS, _ENDLESS)


def importance_ratio(logp_T: torch.Tensor, old_logp_T: torch.Tensor) -> torch.Tensor:
    """p/q of each token, bounded, from ln p and ln q [T]; 1 if they are equal, -inf included.

    Its derivative by ln p is itself, even when it is bounded: a token that ran away with A < 0 is
    still called back.
    """
    return _Ratio.apply(logp_T, old_logp_T)


class _Ratio(torch.autograd.Function):
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
