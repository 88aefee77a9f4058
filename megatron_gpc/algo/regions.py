"""Which tokens raise entropy and which lower it: the four regions of arXiv 2602.09782.

For the surrogate r A, in logit space (METHOD; found independently in arXiv 2602.03392),

    <grad L, grad H>  ~  -A [ p_a (ln p_a + H)  -  sum_x p_x^2 (ln p_x + H) ]
                               token term          baseline term

The sign of the token term alone gives the regions:

    E1  -ln p < H (likely token)    A > 0   entropy falls
    E2  -ln p > H (unlikely token)  A > 0   entropy rises
    E3  -ln p < H (likely token)    A < 0   entropy rises
    E4  -ln p > H (unlikely token)  A < 0   entropy falls
"""

from __future__ import annotations

import torch

from megatron_gpc.types import TokenStats


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


def entropy_inner_product(stats: TokenStats, advantages_T: torch.Tensor) -> torch.Tensor:
    """<grad of r A, grad of H> of each token in logit space at r = 1, baseline term included [T].

    Positive where a step along the token's policy gradient raises its own entropy.  Exact for one
    token's logits; it ignores that tokens share parameters and that Adam rescales.
    """
    token_T = stats.logp_T.exp() * (stats.logp_T + stats.entropy_T)
    baseline_T = stats.sum_p2_logp_T + stats.entropy_T * stats.sum_p2_T
    return -advantages_T * (token_T - baseline_T)
