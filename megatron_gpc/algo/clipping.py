"""Clip thresholds as functions of a token's probability (arXiv 2602.09782).

Upper threshold Hi(p) = a_hi p + b_hi, lower threshold Lo(p) = a_lo p + b_lo; the importance ratio
is kept in [1 - eps_minus, 1 + eps_plus].  With a negative slope unlikely tokens may move further
than likely ones: raising the upper bound for them (region E2) raises entropy without over-training
likely tokens (E1); loosening the lower bound for them (E4) lowers it.

p is the CURRENT probability, so the bound moves as the policy does.  No gradient flows through it:
a threshold is a constant of the step, and a token outside its bound on the pessimistic side has
exactly zero gradient, as in PPO.  (The paper leaves this open.)
"""

from __future__ import annotations

import torch

from megatron_gpc.config import ClipConfig
from megatron_gpc.types import Bounds

Line = tuple[float, float]  # (slope, intercept) of a threshold over p


def mix(weight: float, a: Line, b: Line) -> Line:
    """weight * a + (1 - weight) * b; exactly a or b if the weight is 1 or 0."""
    if weight == 1.0:
        return a
    if weight == 0.0:
        return b
    return (weight * a[0] + (1.0 - weight) * b[0], weight * a[1] + (1.0 - weight) * b[1])


def opened_bounds(clip: ClipConfig, hi: float = 0.0, lo: float = 0.0) -> Bounds:
    """Thresholds on their way from the standard ones to Hi(p) and Lo(p).

    Args:
        hi, lo: how far the upper and the lower one have gone; 0: standard, 1: Hi(p), Lo(p).
    """
    return affine_bounds(
        mix(hi, (clip.hi_slope, clip.hi_intercept), (0.0, clip.eps_high)),
        mix(lo, (clip.lo_slope, clip.lo_intercept), (0.0, clip.eps_low)),
    )


def affine_bounds(eps_high: Line, eps_low: Line) -> Bounds:
    """Bounds from two thresholds, each given as (slope, intercept) over p.

    The 1 is added to the intercept here, in double precision, so that a constant threshold gives
    bit for bit the fp32 number that `torch.clamp(ratio, 1 - eps, 1 + eps)` compares with.
    """
    return Bounds(
        upper_slope=eps_high[0],
        upper_intercept=1.0 + eps_high[1],
        lower_slope=0.0 - eps_low[0],
        lower_intercept=1.0 - eps_low[1],
    )


def ratio_interval(bounds: Bounds, p_T: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Lowest and highest ratio of each token, from its current probability (the form trained with).

    Args:
        bounds: this step's thresholds.
        p_T: probability of each sampled token under the policy being trained; no gradient is taken.

    Returns:
        (lower_T, upper_T), of p_T's dtype.
    """
    p_T = p_T.detach()
    return (
        bounds.lower_slope * p_T + bounds.lower_intercept,
        bounds.upper_slope * p_T + bounds.upper_intercept,
    )


def probability_interval(bounds: Bounds, q_T: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The same bounds solved for p: lowest and highest current probability, from the old one alone.

        p <= q (1 + b_hi) / (1 - a_hi q)        p >= q (1 - b_lo) / (1 + a_lo q)

    Agrees with `ratio_interval` token for token wherever both denominators are positive, that is
    for every q in [0, 1] if a_hi < 1 and a_lo > -1.  Used to draw and to check, not to train.

    Args:
        bounds: this step's thresholds.
        q_T: probability of each sampled token under the old policy.

    Returns:
        (lowest_p_T, highest_p_T).
    """
    return (
        q_T * bounds.lower_intercept / (1.0 - bounds.lower_slope * q_T),
        q_T * bounds.upper_intercept / (1.0 - bounds.upper_slope * q_T),
    )
