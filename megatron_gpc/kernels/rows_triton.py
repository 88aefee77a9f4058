"""kernels/rows.py for NVIDIA GPUs: each function reads the chunk of logits once, in one kernel.

`_fold` is compiled for each number of columns, of which there are few: chunks are powers of two.
"""

from __future__ import annotations

import torch
import triton  # pyright: ignore[reportMissingImports] - comes with torch for CUDA
import triton.language as tl  # pyright: ignore[reportMissingImports]

from megatron_gpc.kernels.rows import RowGradient

BLOCK = 2048
"""Logits of a token that are looked at together."""
ROWS = 4
"""Tokens that a program folds."""
WARPS = 8


def fold(
    part_T6: torch.Tensor, logits_TC: torch.Tensor, column_T: torch.Tensor, scale: float
) -> None:
    """As rows.fold."""
    tokens, columns = logits_TC.shape
    if tokens:
        _fold[(triton.cdiv(tokens, ROWS),)](  # pyright: ignore[reportIndexIssue]
            *(part_T6, logits_TC, column_T, scale, tokens, logits_TC.stride(0)),
            **{"COLUMNS": columns, "ROWS": ROWS, "BLOCK": BLOCK, "num_warps": WARPS},
        )


def turn_into_gradient(
    logits_TC: torch.Tensor, column_T: torch.Tensor, scale: float, row: RowGradient
) -> None:
    """As rows.turn_into_gradient."""
    tokens, columns = logits_TC.shape
    slope_T = row.constant_T if row.slope_T is None else row.slope_T  # one that is not read
    numbers = (row.max_T, slope_T, row.constant_T, row.target_T)
    if tokens:
        _turn_into_gradient[  # pyright: ignore[reportIndexIssue]
            (tokens, triton.cdiv(columns, BLOCK))
        ](
            *(logits_TC, column_T, scale, *(each.contiguous() for each in numbers)),
            *(columns, logits_TC.stride(0)),
            **{"SLOPED": row.slope_T is not None, "BLOCK": BLOCK, "num_warps": WARPS},
        )


@triton.jit
def _fold(
    part_pointer,
    logits_pointer,
    column_pointer,
    scale,
    tokens,
    stride,
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    LEAST: tl.constexpr = -3.4028234663852886e38  # the maximum of no logits (kernels/merging.py)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    there = row < tokens
    part = part_pointer + row * 6
    target_column = tl.load(column_pointer + row, mask=there, other=-1)
    m = tl.load(part, mask=there, other=LEAST)
    s = tl.load(part + 1, mask=there, other=0.0)
    xs = tl.load(part + 2, mask=there, other=0.0)
    s2 = tl.load(part + 3, mask=there, other=0.0)
    xs2 = tl.load(part + 4, mask=there, other=0.0)
    target = tl.load(part + 5, mask=there, other=0.0)
    begin = logits_pointer + row[:, None].to(tl.int64) * stride
    for first in range(0, COLUMNS, BLOCK):
        column = first + tl.arange(0, BLOCK)
        valid = there[:, None] & (column < COLUMNS)[None, :]
        x = tl.load(begin + column[None, :], mask=valid, other=0.0).to(tl.float32) * scale
        target += tl.sum(tl.where(valid & (column[None, :] == target_column[:, None]), x, 0.0), 1)
        larger = tl.maximum(m, tl.max(tl.where(valid, x, LEAST), 1))
        # what was relative to the old maximum becomes relative to the new one
        d = tl.where(s > 0, m - larger, 0.0)
        w = tl.exp(d)
        xs, xs2 = w * (xs + d * s), w * w * (xs2 + d * s2)
        s, s2, m = w * s, w * w * s2, larger
        y = tl.where(valid, x - m[:, None], 0.0)
        e = tl.where(valid, tl.exp(y), 0.0)
        ye = y * e
        s += tl.sum(e, 1)
        xs += tl.sum(ye, 1)
        s2 += tl.sum(e * e, 1)
        xs2 += tl.sum(ye * e, 1)
    tl.store(part, m, mask=there)
    tl.store(part + 1, s, mask=there)
    tl.store(part + 2, xs, mask=there)
    tl.store(part + 3, s2, mask=there)
    tl.store(part + 4, xs2, mask=there)
    tl.store(part + 5, target, mask=there)


@triton.jit
def _turn_into_gradient(
    logits_pointer,
    column_pointer,
    scale,
    max_pointer,
    slope_pointer,
    constant_pointer,
    target_pointer,
    columns,
    stride,
    SLOPED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    valid = column < columns
    place = logits_pointer + row.to(tl.int64) * stride + column
    x = tl.load(place, mask=valid, other=0.0).to(tl.float32)
    y = x * scale - tl.load(max_pointer + row)
    factor = tl.load(constant_pointer + row)
    if SLOPED:
        factor += tl.load(slope_pointer + row) * y
    hit = column == tl.load(column_pointer + row)
    gradient = tl.exp(y) * factor + tl.where(hit, tl.load(target_pointer + row), 0.0)
    tl.store(place, gradient.to(logits_pointer.dtype.element_ty), mask=valid)
