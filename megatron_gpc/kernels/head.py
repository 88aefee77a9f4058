"""The LM head and what is asked of its logits, at the speed of the matrix products.

From hidden states [T, D] and this rank's shard [V, D] of the head to log-prob, entropy and their
gradients.  The vocabulary is taken in chunks: a matrix product writes [T, C] logits, one pass folds
them into six numbers a token (kernels/merging.py), and the next chunk takes their place.  The way
back makes each chunk again, turns it into its gradient in place, and adds two products of it to the
gradients of hidden states (in fp32) and head.  Where the logits fit they are kept instead, which
saves one product of four, and become their own gradient.

Tensor-parallel ranks exchange six numbers a token forward, and the gradient of hidden states
backward.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
from types import ModuleType
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from megatron_gpc.kernels import chunk_vocab
from megatron_gpc.kernels import rows as torch_rows
from megatron_gpc.kernels.merging import Merged, empty_part, merge_ranks
from megatron_gpc.kernels.rows import RowGradient
from megatron_gpc.types import TokenStats


class _Head(NamedTuple):
    """What does not depend on tensors; the arguments of `head_stats`."""

    vocab_size: int
    group: dist.ProcessGroup | None
    temperature: float
    entropy_grad: bool
    keep_logits: bool
    chunk: int
    rows: ModuleType


def head_stats(
    hidden_TD: torch.Tensor,
    weight_VD: torch.Tensor,
    targets_T: torch.Tensor,
    *,
    vocab_size: int,
    group: dist.ProcessGroup | None = None,
    temperature: float = 1.0,
    entropy_grad: bool = False,
    keep_logits: bool = False,
    chunk: int | None = None,
    rows: ModuleType | None = None,
) -> TokenStats:
    """Log-prob, entropy, sum p^2 and sum p^2 ln p of softmax(hidden weight^T / temperature).

    Every rank of `group` must call this with the same hidden_TD and targets_T, empty ones too.

    Args:
        hidden_TD: bf16 or fp32.  Its gradient is summed over the group.
        weight_VD: this rank's shard, of the same dtype; rank r holds tokens r*V to (r+1)*V.  If it
            has a `main_grad`, its gradient is added there, as megatron-core's own layers do.
        targets_T: sampled tokens, int64, 0 <= target < vocab_size.
        vocab_size: true size of the vocabulary; rows beyond it are padding and take no part.
        group: the tensor-parallel ranks; None if the vocabulary is not cut.
        temperature: divides the logits, here and nowhere else.
        entropy_grad: whether entropy_T carries gradient.
        keep_logits: T x V of them, until the backward pass, which can then be run only once.
        chunk: entries of the vocabulary whose logits are made at a time; None: what suits the
            device.
        rows: the module that goes over the logits, kernels/rows.py or kernels/rows_triton.py; None:
            what suits the device.

    Returns:
        TokenStats, fp32, the same on every rank of the group.  logp_T carries gradient; entropy_T
        does if asked for; sum_p2_T and sum_p2_logp_T never do.
    """
    trained = torch.is_grad_enabled() and (hidden_TD.requires_grad or weight_VD.requires_grad)
    keep_logits, device = keep_logits and trained, hidden_TD.device.type
    if chunk is None:
        whole = keep_logits and device != "cpu"
        chunk = len(weight_VD) if whole else chunk_vocab(len(hidden_TD), device)
    rows = rows or rows_for(device)
    head = _Head(vocab_size, group, temperature, entropy_grad, keep_logits, chunk, rows)
    return TokenStats(*_HeadStats.apply(hidden_TD, weight_VD, targets_T, head))


class _HeadStats(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_TD: torch.Tensor,
        weight_VD: torch.Tensor,
        targets_T: torch.Tensor,
        head: _Head,
    ) -> tuple[torch.Tensor, ...]:
        offset = 0 if head.group is None else head.group.rank() * len(weight_VD)
        real = min(max(head.vocab_size - offset, 0), len(weight_VD))  # rows that are no padding
        columns = [slice(v, min(v + head.chunk, real)) for v in range(0, real, head.chunk)]
        local_T = targets_T - offset
        part_T6 = empty_part(hidden_TD)
        buffer = None if head.keep_logits else _buffer(hidden_TD, columns)
        kept = []
        for column in columns:
            logits_TC = _logits(hidden_TD, weight_VD[column], buffer)
            head.rows.fold(part_T6, logits_TC, local_T - column.start, 1 / head.temperature)
            if head.keep_logits:
                kept.append(logits_TC)
        merged = merge_ranks(part_T6, head.group)

        ctx.save_for_backward(hidden_TD, weight_VD, local_T, *merged)
        ctx.weight, ctx.head, ctx.columns, ctx.kept = weight_VD, head, columns, kept
        stats = merged[:4]
        ctx.mark_non_differentiable(*stats[2:], *([] if head.entropy_grad else [stats[1]]))
        return stats

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        hidden_TD, weight_VD, local_T, *numbers = ctx.saved_tensors
        head, kept, scale = ctx.head, ctx.kept, 1 / ctx.head.temperature
        entropy_grad_T = grads[1] if head.entropy_grad else None
        row = RowGradient.of(Merged(*numbers), scale, grads[0], entropy_grad_T)
        if head.keep_logits:
            assert len(kept) == len(ctx.columns), "logits became their gradient in the first pass"
        buffer = None if head.keep_logits else _buffer(hidden_TD, ctx.columns)
        hidden_grad_TD = torch.zeros_like(hidden_TD, dtype=torch.float32)
        trains_weight, has_main_grad = ctx.needs_input_grad[1], hasattr(ctx.weight, "main_grad")
        weight_grad_VD = None
        if trains_weight and not has_main_grad:
            weight_grad_VD = torch.empty_like(weight_VD)
            weight_grad_VD[ctx.columns[-1].stop if ctx.columns else 0 :] = 0
        for column in ctx.columns:
            logits_TC = kept.pop(0) if kept else _logits(hidden_TD, weight_VD[column], buffer)
            head.rows.turn_into_gradient(logits_TC, local_T - column.start, scale, row)
            if weight_grad_VD is not None:
                torch.mm(logits_TC.T, hidden_TD, out=weight_grad_VD[column])
            elif trains_weight:
                _add_product(ctx.weight.main_grad[column], logits_TC.T, hidden_TD)
            _add_product(hidden_grad_TD, logits_TC, weight_VD[column])
            del logits_TC
        del buffer  # before the weight's gradient takes memory
        if head.group is not None and head.group.size() > 1:
            dist.all_reduce(hidden_grad_TD, group=head.group)
        if trains_weight and has_main_grad:
            weight_grad_VD = _stand_in(ctx.weight)
        return hidden_grad_TD.to(hidden_TD.dtype), weight_grad_VD, None, None


@functools.cache
def rows_for(device_type: str) -> ModuleType:
    """What goes over logits there: Triton's kernels on a GPU, if Triton is installed."""
    if device_type == "cpu" or importlib.util.find_spec("triton") is None:
        return torch_rows
    return importlib.import_module("megatron_gpc.kernels.rows_triton")


def _buffer(hidden_TD: torch.Tensor, columns: list[slice]) -> torch.Tensor:
    """Memory for the logits of any chunk; the first is the largest."""
    return hidden_TD.new_empty(len(hidden_TD) * (columns[0].stop if columns else 0))


def _logits(
    hidden_TD: torch.Tensor, weight_CD: torch.Tensor, buffer: torch.Tensor | None
) -> torch.Tensor:
    """hidden weight^T, in the buffer if there is one."""
    if buffer is None:
        return hidden_TD @ weight_CD.T
    shape = len(hidden_TD), len(weight_CD)
    return torch.mm(hidden_TD, weight_CD.T, out=buffer[: shape[0] * shape[1]].view(shape))


def _add_product(sum_NM: torch.Tensor, a_NK: torch.Tensor, b_KM: torch.Tensor) -> None:
    """sum += a b, in one pass over the sum where its dtype allows that."""
    if sum_NM.dtype == a_NK.dtype:
        sum_NM.addmm_(a_NK, b_KM)
    elif _adds_to_fp32(sum_NM.device):
        torch.addmm(sum_NM, a_NK, b_KM, out_dtype=sum_NM.dtype, out=sum_NM)
    else:
        sum_NM += a_NK @ b_KM


@functools.cache
def _adds_to_fp32(device: torch.device) -> bool:
    """Whether this torch adds a product of bf16 to fp32 there; 2.10 wants the sum in bf16 too."""
    sum_NM = torch.ones(16, 16, device=device)
    ones = torch.ones_like(sum_NM, dtype=torch.bfloat16)
    try:
        torch.addmm(sum_NM, ones, ones, out_dtype=torch.float32, out=sum_NM)
    except (NotImplementedError, RuntimeError):  # the first is a CPU's answer
        return False
    return bool((sum_NM == 17).all())


def _stand_in(weight_VD: Any) -> torch.Tensor:
    """What autograd is given for a gradient that is in main_grad already, so that the hook of
    megatron-core's DDP runs.  The hook leaves it alone, unless the weight is the embedding too,
    whose gradient autograd adds."""
    weight_VD.grad_added_to_main_grad = True
    if getattr(weight_VD, "zero_out_wgrad", False):
        return torch.zeros_like(weight_VD)
    return torch.empty_like(weight_VD)
