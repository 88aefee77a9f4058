"""The six numbers that a part of a token's vocabulary is folded into, and how parts are merged.

They are the maximum m of the part's logits x and, relative to it,

    sum e^(x-m)    sum (x-m) e^(x-m)    sum e^2(x-m)    sum (x-m) e^2(x-m)    the target's logit

(0 if the target is in another part).  Parts merge like log-sum-exp: what was relative to m becomes
relative to the maximum of all.  An all_gather of them is all that tensor-parallel ranks exchange.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.distributed as dist


class Merged(NamedTuple):
    """What follows from the merged numbers of the whole vocabulary, fp32."""

    logp_T: torch.Tensor
    entropy_T: torch.Tensor
    sum_p2_T: torch.Tensor
    sum_p2_logp_T: torch.Tensor
    max_T: torch.Tensor
    """The largest logit."""
    log_s_T: torch.Tensor
    """ln sum e^(x - max)."""


def empty_part(like_TD: torch.Tensor) -> torch.Tensor:
    """[T, 6] of no logits at all: merging it changes nothing."""
    part_T6 = like_TD.new_zeros(len(like_TD), 6, dtype=torch.float32)
    part_T6[:, 0] = torch.finfo(torch.float32).min
    return part_T6


def merge(parts_RT6: torch.Tensor) -> torch.Tensor:
    """[T, 6] of R parts together."""
    m, s, xs, s2, xs2, target = parts_RT6.unbind(2)  # each [R, T]
    max_T = m.amax(0)
    d = m - max_T
    w, w2 = d.exp(), (2 * d).exp()
    sums = (w * s, w * (xs + d * s), w2 * s2, w2 * (xs2 + d * s2), target)
    return torch.stack([max_T, *(each.sum(0) for each in sums)], 1)


def merge_ranks(part_T6: torch.Tensor, group: dist.ProcessGroup | None) -> Merged:
    """What the parts of all ranks of the group say.  A collective: every rank enters it.

    Args:
        group: None if the vocabulary is not cut.
    """
    if group is not None and group.size() > 1:
        parts_RT6 = part_T6.new_empty(group.size(), *part_T6.shape)
        dist.all_gather_into_tensor(parts_RT6.flatten(0, 1), part_T6, group=group)
        part_T6 = merge(parts_RT6)
    max_T, s_T, xs_T, s2_T, xs2_T, target_T = part_T6.unbind(1)
    log_s_T = s_T.log()
    sum_p2_T = s2_T / s_T**2
    return Merged(
        logp_T=(target_T - max_T) - log_s_T,
        entropy_T=log_s_T - xs_T / s_T,
        sum_p2_T=sum_p2_T,
        sum_p2_logp_T=xs2_T / s_T**2 - log_s_T * sum_p2_T,
        max_T=max_T,
        log_s_T=log_s_T,
    )
