"""One Megatron parameter: how Hugging Face tensors make it up, and how tensor parallelism cuts it.

Everything here moves numbers and never computes with them: each function is undone, bit for bit,
by its partner (`to_megatron` by `to_hf`, `shard` by `unshard`), whatever the dtype and the device.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from megatron_gpc.errors import UserError

Kind = Literal["copy", "qkv", "gate_up", "vocab"]
"""How HF tensors become one Megatron tensor:

    copy     one tensor, as it is
    qkv      query, key, value -> for each key-value head: its query heads, then key, then value
    gate_up  gate, up -> [gate; up]; tensor parallelism cuts each half on its own
    vocab    one tensor, zero rows added until every usual tensor parallelism divides it
"""

_VOCAB_MULTIPLE = 128


@dataclass(frozen=True)
class Param:
    """One parameter of the whole model, before any parallelism cuts it.

    >>> Param(megatron="decoder.layers.0.mlp.linear_fc1.weight",
    ...       hf=("model.layers.0.mlp.gate_proj.weight", "model.layers.0.mlp.up_proj.weight"),
    ...       hf_shapes=((352, 128), (352, 128)), shape=(704, 128), kind="gate_up", split_dim=0,
    ...       layer=0)
    """

    megatron: str
    """Global canonical name: transformer-engine naming, layers and experts numbered over the whole
    model (`decoder.layers.3.mlp.experts.local_experts.5.linear_fc1.weight`)."""
    hf: tuple[str, ...]
    """Hugging Face tensors that make it up, in the order that `kind` says."""
    hf_shapes: tuple[tuple[int, ...], ...]
    """Their shapes."""
    shape: tuple[int, ...]
    """Shape of the whole Megatron tensor, vocabulary padding included."""
    kind: Kind
    split_dim: int | None
    """Dimension that tensor parallelism cuts; None: every rank has it whole.  For experts it is the
    expert tensor parallelism that cuts."""
    layer: int | None = None
    """Global layer number; None for embedding, final norm and output layer."""
    expert: int | None = None
    """Global expert number; None for everything else."""
    groups: int = 0
    """Key-value heads; qkv only."""


def padded_vocab_size(vocab: int, tp: int = 1) -> int:
    """The next multiple of lcm(128, tp): the same for every tp that divides 128.

    >>> padded_vocab_size(151665), padded_vocab_size(151665, 8), padded_vocab_size(130, 3)
    (151680, 151680, 384)
    """
    multiple = math.lcm(_VOCAB_MULTIPLE, tp)
    return -(-vocab // multiple) * multiple


def to_megatron(param: Param, hf_tensors: Sequence[Tensor]) -> Tensor:
    """The whole Megatron tensor [param.shape]; a copy, unless nothing has to move.

    Args:
        hf_tensors: the tensors named by param.hf, in that order, of one dtype.

    Raises:
        UserError: a tensor has another shape than the model's configuration says, or dtypes differ.
    """
    for name, tensor, shape in zip(param.hf, hf_tensors, param.hf_shapes, strict=True):
        _check_shape(name, tensor, shape)
        if tensor.dtype != hf_tensors[0].dtype:
            raise UserError(
                f"{name} is {tensor.dtype}, but {param.hf[0]} is "
                f"{hf_tensors[0].dtype}; both become part of {param.megatron} and must "
                "have one dtype"
            )
    if param.kind == "copy":
        return hf_tensors[0]
    if param.kind == "gate_up":
        return torch.cat(tuple(hf_tensors))
    if param.kind == "qkv":
        per_group = [tensor.unflatten(0, (param.groups, -1)) for tensor in hf_tensors]
        return torch.cat(per_group, dim=1).flatten(0, 1)
    (tensor,) = hf_tensors
    if tensor.shape == param.shape:
        return tensor
    whole = tensor.new_zeros(param.shape)
    whole[: len(tensor)] = tensor
    return whole


def to_hf(param: Param, whole: Tensor) -> tuple[Tensor, ...]:
    """The tensors named by param.hf; views of `whole` if possible.

    Raises:
        UserError: `whole` is not [param.shape].
    """
    _check_shape(param.megatron, whole, param.shape)
    if param.kind == "copy":
        return (whole,)
    if param.kind == "vocab":
        return (whole[: param.hf_shapes[0][0]],)
    rows = [shape[0] for shape in param.hf_shapes]
    if param.kind == "gate_up":
        return whole.split(rows)
    per_group = whole.unflatten(0, (param.groups, -1))
    parts = per_group.split([r // param.groups for r in rows], dim=1)
    return tuple(part.flatten(0, 1) for part in parts)


def shard(param: Param, whole: Tensor, tp_rank: int, tp_size: int) -> Tensor:
    """What tensor-parallel rank `tp_rank` of `tp_size` holds; a view of `whole` if possible.

    With fewer key-value heads than ranks, megatron-core still cuts linear_qkv's rows evenly,
    through the middle of a head if need be, and gathers the product
    (megatron/core/transformer/attention.py, `get_query_key_value_tensors`); so does this.

    Raises:
        UserError: `whole` is not [param.shape], or tp_size does not divide the dimension.
    """
    _check_shape(param.megatron, whole, param.shape)
    if param.split_dim is None or tp_size == 1:
        return whole
    halves = _halves(param)
    size = whole.shape[param.split_dim] // halves
    if size % tp_size:
        raise UserError(
            f"{param.megatron}: tensor parallelism {tp_size} does not divide its "
            f"dimension {param.split_dim} of {size}"
        )
    split = whole.unflatten(param.split_dim, (halves, tp_size, -1))
    return split.select(param.split_dim + 1, tp_rank).flatten(param.split_dim, param.split_dim + 1)


def unshard(param: Param, shards: Sequence[Tensor]) -> Tensor:
    """The whole tensor from every rank's part, in rank order.

    Raises:
        UserError: the parts do not make up [param.shape].
    """
    if param.split_dim is None or len(shards) == 1:
        _check_shape(param.megatron, shards[0], param.shape)
        return shards[0]
    dim, halves = param.split_dim, _halves(param)
    expected = list(param.shape)
    expected[dim] //= len(shards)
    for rank, part in enumerate(shards):
        _check_shape(f"{param.megatron}, part {rank} of {len(shards)}", part, tuple(expected))
    parts = [part.unflatten(dim, (halves, -1)) for part in shards]
    return torch.cat(parts, dim=dim + 1).flatten(dim, dim + 1)


def _halves(param: Param) -> int:
    return 2 if param.kind == "gate_up" else 1


def _check_shape(name: str, tensor: Tensor, expected: tuple[int, ...]) -> None:
    if tuple(tensor.shape) != expected:
        raise UserError(f"{name} has shape {list(tensor.shape)}, expected {list(expected)}")
