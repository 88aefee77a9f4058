"""Which tokens raise entropy and which lower it: the four regions of arXiv 2602.09782.

Let x be the logits of one response token divided by the temperature, p = softmax(x), a the sampled
token, and w = dJ / d ln p_a what the objective J gives it: r A inside the bounds, 0 where the bound
took its gradient.  (The identity was found independently in arXiv 2602.03392.)

    ln p_a = x_a - ln sum_v e^(x_v)       so  dJ/dx_v = w ([v = a] - p_v)
    H = -sum_v p_v ln p_v                 so  dH/dx_v = -p_v (ln p_v + H)

    <dJ/dx, dH/dx>  =  -w [ p_a (ln p_a + H)  -  sum_v p_v^2 (ln p_v + H) ]
                               token term          baseline term

A step x + eta dJ/dx changes the token's entropy by eta times this, to first order.  The baseline
term is sum p^2 ln p + H sum p^2, which the vocab-parallel kernel gives.  The token's gradient has
the norm

    |dJ/dx|  =  |w| sqrt((1 - p_a)^2 + sum_(v != a) p_v^2)  =  |w| sqrt(1 - 2 p_a + sum_v p_v^2)

The sign of the token term alone, for w of A's sign, gives the regions:

    E1  -ln p < H (likely token)    A > 0   entropy falls
    E2  -ln p > H (unlikely token)  A > 0   entropy rises
    E3  -ln p < H (likely token)    A < 0   entropy rises
    E4  -ln p > H (unlikely token)  A < 0   entropy falls
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from megatron_gpc.config.types import Region
from megatron_gpc.types import TokenStats

REGIONS: tuple[Region, ...] = ("e1", "e2", "e3", "e4")


def region_masks(
    logp_T: torch.Tensor, entropy_T: torch.Tensor, advantages_T: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Boolean [T] masks of E1..E4.

    Tokens with A = 0 (nothing to learn) or -ln p = H (neither side) belong to no region.
    """
    likely_T, unlikely_T = -logp_T < entropy_T, -logp_T > entropy_T
    positive_T, negative_T = advantages_T > 0, advantages_T < 0
    return (
        likely_T & positive_T,
        unlikely_T & positive_T,
        likely_T & negative_T,
        unlikely_T & negative_T,
    )


def keep_regions(
    advantages_T: torch.Tensor, masks: Sequence[torch.Tensor], kept: Sequence[Region]
) -> torch.Tensor:
    """Advantages [T] with 0, and so no gradient, for every token outside the kept regions.

    With all four kept they are returned as they are.  A mask is a constant of the update: no
    gradient flows through p and H into the choice.

    Args:
        masks: of `region_masks`.
        kept: names among REGIONS.
    """
    if set(kept) == set(REGIONS):
        return advantages_T
    chosen_T = torch.stack([masks[REGIONS.index(name)] for name in kept]).any(0)
    return advantages_T.where(chosen_T, 0.0)


def entropy_inner_product(stats: TokenStats, weight_T: torch.Tensor) -> torch.Tensor:
    """<dJ/dx, dH/dx> of each token, baseline term included [T]; derived above.

    Positive if a step along the token's policy gradient raises its own entropy.  Exact for one
    token's logits; it ignores that tokens share parameters and that Adam rescales.

    Args:
        weight_T: dJ / d ln p; with advantages this is the objective at r = 1.
    """
    logp_T = stats.logp_T.clamp(min=-200.0)  # exp gives 0 there already; 0 * -inf would be NaN
    token_T = logp_T.exp() * (logp_T + stats.entropy_T)
    baseline_T = stats.sum_p2_logp_T + stats.entropy_T * stats.sum_p2_T
    return -weight_T * (token_T - baseline_T)


def gradient_norm(stats: TokenStats, weight_T: torch.Tensor) -> torch.Tensor:
    """|dJ/dx| of each token [T]: its share of the gradient before the network.  The arguments are
    those of `entropy_inner_product`."""
    squared_T = 1 - 2 * stats.logp_T.exp() + stats.sum_p2_T
    return weight_T.abs() * squared_T.clamp(min=0).sqrt()  # p_a = 1 can round to below 0


@dataclass(frozen=True)
class RegionSums:
    """Sums over the tokens of E1..E4 [4], and over all tokens."""

    tokens: torch.Tensor
    clipped: torch.Tensor
    """Tokens whose gradient a bound took."""
    mass: torch.Tensor
    """Sum of |dJ/dx|."""
    dh: torch.Tensor
    """Sum of <dJ/dx, dH/dx> [nats per unit of eta]."""
    all_mass: torch.Tensor
    all_dh: torch.Tensor


def region_sums(
    stats: TokenStats,
    masks: Sequence[torch.Tensor],
    weight_T: torch.Tensor,
    clipped_T: torch.Tensor,
) -> RegionSums:
    """What the tokens of each region do in one update; no gradient.

    Args:
        stats: of the policy that the update starts from, without gradient.
        masks: of `region_masks`.
        weight_T: dJ / d ln p, 0 for tokens that pass no gradient.
        clipped_T: tokens whose gradient a bound took.
    """
    mass_T, dh_T = gradient_norm(stats, weight_T), entropy_inner_product(stats, weight_T)
    values_T4 = torch.stack([torch.ones_like(mass_T), clipped_T.to(mass_T), mass_T, dh_T], 1)
    sums = torch.stack(list(masks)).to(values_T4) @ values_T4
    return RegionSums(*sums.T, all_mass=mass_T.sum(), all_dh=dh_T.sum())
