"""What is done with a chunk of logits between the head's matrix products; torch, on any device.

Each function goes over the chunk once, in tiles that stay in a CPU's cache, and makes no copy of it
that is larger than a tile.  kernels/rows_triton.py does the same in one kernel each.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from megatron_gpc.kernels.merging import Merged, merge

TILE_LOGITS = {"cpu": 2**17, "cuda": 2**24}


class RowGradient(NamedTuple):
    """What the gradient of a token's logits x takes beside them, fp32: with y = scale x - max

    dx_v = e^y_v (slope y_v + constant) + [v is target] target
    """

    max_T: torch.Tensor
    slope_T: torch.Tensor | None
    """None: 0."""
    constant_T: torch.Tensor
    target_T: torch.Tensor

    @classmethod
    def of(
        cls,
        merged: Merged,
        scale: float,
        grad_logp_T: torch.Tensor,
        grad_entropy_T: torch.Tensor | None,
    ) -> RowGradient:
        """From d logp/dx_v = [v is target] - p_v and d H/dx_v = -p_v (ln p_v + H), by scale."""
        grad_logp_T = scale * grad_logp_T
        slope_T, constant_T, inverse_s_T = None, grad_logp_T, (-merged.log_s_T).exp()
        if grad_entropy_T is not None:
            slope_T = scale * grad_entropy_T
            constant_T = grad_logp_T + slope_T * (merged.entropy_T - merged.log_s_T)
            slope_T = -slope_T * inverse_s_T
        return cls(merged.max_T, slope_T, -constant_T * inverse_s_T, grad_logp_T)


def fold(
    part_T6: torch.Tensor, logits_TC: torch.Tensor, column_T: torch.Tensor, scale: float
) -> None:
    """Merge a chunk of logits into what `part_T6` says of those before (kernels/merging.py).

    Args:
        column_T: which of the chunk's columns is the target; it may lie outside.
        scale: multiplies the logits.
    """
    here_T = (column_T >= 0) & (column_T < logits_TC.shape[1])
    at_T1 = column_T.clamp(0, logits_TC.shape[1] - 1)[:, None]
    chunk_T6 = torch.empty_like(part_T6)
    chunk_T6[:, 5] = (logits_TC.gather(1, at_T1)[:, 0].float() * scale).where(here_T, 0.0)
    for rows, y, e in _tiles(logits_TC):
        x = logits_TC[rows]
        m = x.amax(1).float() * scale
        torch.add(-m[:, None], x, alpha=scale, out=y)
        torch.exp(y, out=e)
        sums = [m, e.sum(1), y.mul_(e).sum(1)]
        xs2 = y.mul_(e).sum(1)
        chunk_T6[rows, :5] = torch.stack([*sums, e.mul_(e).sum(1), xs2], 1)
    part_T6.copy_(merge(torch.stack([part_T6, chunk_T6])))


def turn_into_gradient(
    logits_TC: torch.Tensor, column_T: torch.Tensor, scale: float, row: RowGradient
) -> None:
    """Write the gradient of a chunk of logits over them; arguments as of `fold`."""
    here_T = (column_T >= 0) & (column_T < logits_TC.shape[1])
    at_T1 = column_T.clamp(0, logits_TC.shape[1] - 1)[:, None]
    target_T1 = row.target_T.where(here_T, 0.0)[:, None]
    for rows, y, e in _tiles(logits_TC):
        torch.add(-row.max_T[rows, None], logits_TC[rows], alpha=scale, out=y)
        torch.exp(y, out=e)
        if row.slope_T is None:
            e.mul_(row.constant_T[rows, None])
        else:
            e.mul_(y.mul_(row.slope_T[rows, None]).add_(row.constant_T[rows, None]))
        e.scatter_add_(1, at_T1[rows], target_T1[rows])
        logits_TC[rows] = e


def _tiles(logits_TC: torch.Tensor) -> list[tuple[slice, torch.Tensor, torch.Tensor]]:
    """(rows, and two fp32 tensors [rows, C] to work in), the same memory for every tile."""
    tokens, columns = logits_TC.shape
    limit = TILE_LOGITS.get(logits_TC.device.type, TILE_LOGITS["cuda"])
    height = max(1, min(limit // max(columns, 1), tokens))
    work = logits_TC.new_empty(2, height, columns, dtype=torch.float32)
    tiles = []
    for begin in range(0, tokens, height):
        end = min(begin + height, tokens)
        tiles.append((slice(begin, end), work[0, : end - begin], work[1, : end - begin]))
    return tiles
