"""kernels/rows.py for NVIDIA GPUs: each function reads the chunk of logits once, in one kernel.

`_fold` is compiled for each number of columns, of which there are few: chunks are powers of two.
"""

from __future__ import annotations

import torch
import triton  # pyright: ignore[reportMissingImports] - comes with torch for CUDA
import triton.language as tl  # pyright: ignore[reportMissingImports]

from megatron_gpc.kernels.rows import RowGradient

FOLD_BLOCK = 4096
"""Logits of a token that `_fold` looks at together."""
TURN_BLOCK = 2048
WARPS = 4


def fold(
    part_T6: torch.Tensor, logits_TC: torch.Tensor, column_T: torch.Tensor, scale: float
) -> None:
    """As rows.fold."""
    tokens, columns = logits_TC.shape
    if tokens:
        _fold[(tokens,)](  # pyright: ignore[reportIndexIssue]
            *(part_T6, logits_TC, column_T, scale, logits_TC.stride(0)),
            **{"COLUMNS": columns, "BLOCK": FOLD_BLOCK, "num_warps": WARPS},
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
            (tokens, triton.cdiv(columns, TURN_BLOCK))
        ](
            *(logits_TC, column_T, scale, *(each.contiguous() for each in numbers)),
            *(columns, logits_TC.stride(0)),
            **{"SLOPED": row.slope_T is not None, "BLOCK": TURN_BLOCK, "num_warps": WARPS},
        )


@triton.jit
def _fold(
    part_pointer,
    logits_pointer,
    column_pointer,
    scale,
    stride,
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    ABSENT: tl.constexpr = -1e20  # no logit's, and exp of it is 0; times 0 it is 0, unlike infinity
    row = tl.program_id(0)
    part = part_pointer + row * 6
    m, s, xs = tl.load(part), tl.load(part + 1), tl.load(part + 2)
    s2, xs2, target = tl.load(part + 3), tl.load(part + 4), tl.load(part + 5)
    begin = logits_pointer + row.to(tl.int64) * stride
    hit = tl.load(column_pointer + row)
    here = (hit >= 0) & (hit < COLUMNS)
    target += tl.load(begin + hit, mask=here, other=0.0).to(tl.float32) * scale
    for first in range(0, COLUMNS, BLOCK):
        column = first + tl.arange(0, BLOCK)
        x = tl.load(begin + column, mask=column < COLUMNS, other=ABSENT).to(tl.float32) * scale
        larger = tl.maximum(m, tl.max(x, 0))
        # what was relative to the old maximum becomes relative to the new one
        d = tl.where(s > 0, m - larger, 0.0)
        w = tl.exp(d)
        xs, xs2 = w * (xs + d * s), w * w * (xs2 + d * s2)
        s, s2, m = w * s, w * w * s2, larger
        y = x - m
        e = tl.exp(y)
        ye = y * e
        s += tl.sum(e, 0)
        xs += tl.sum(ye, 0)
        s2 += tl.sum(e * e, 0)
        xs2 += tl.sum(ye * e, 0)
    tl.store(part, m)
    tl.store(part + 1, s)
    tl.store(part + 2, xs)
    tl.store(part + 3, s2)
    tl.store(part + 4, xs2)
    tl.store(part + 5, target)


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
