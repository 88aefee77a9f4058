"""HF -> Megatron -> shards -> Megatron -> HF gives back every bit."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import Checkpoint
from torch import Tensor

from megatron_gpc.errors import UserError
from megatron_gpc.weights import (
    Param,
    family_of,
    padded_vocab_size,
    shard,
    to_hf,
    to_megatron,
    unshard,
)


def numbered(*shape: int, start: int = 0) -> Tensor:
    return torch.arange(start, start + math.prod(shape), dtype=torch.float32).reshape(shape)


def qkv_param(groups: int, per_group: int, head_dim: int, hidden: int) -> Param:
    q, kv = groups * per_group * head_dim, groups * head_dim
    return Param(
        "linear_qkv.weight",
        ("q", "k", "v"),
        ((q, hidden), (kv, hidden), (kv, hidden)),
        (q + 2 * kv, hidden),
        "qkv",
        0,
        groups=groups,
    )


GATE_UP = Param("linear_fc1.weight", ("gate", "up"), ((8, 3), (8, 3)), (16, 3), "gate_up", 0)
ROW = Param("linear_fc2.weight", ("down",), ((3, 8),), (3, 8), "copy", 1)
NORM = Param("final_layernorm.weight", ("norm",), ((3,),), (3,), "copy", None)
VOCAB = Param("output_layer.weight", ("head",), ((131, 3),), (256, 3), "vocab", 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tp", [1, 2, 4])
def test_every_family_comes_back_bit_for_bit(
    checkpoint: Checkpoint, tp: int, dtype: torch.dtype
) -> None:
    before = {name: tensor.to(dtype) for name, tensor in checkpoint.tensors().items()}
    after: dict[str, Tensor] = {}
    for param in family_of(checkpoint.config).params(checkpoint.config, tp):
        whole = to_megatron(param, [before[name] for name in param.hf])
        assert tuple(whole.shape) == param.shape
        parts = [shard(param, whole, rank, tp).clone() for rank in range(tp)]
        after.update(zip(param.hf, to_hf(param, unshard(param, parts)), strict=True))
    assert after.keys() == before.keys()
    for name, tensor in before.items():
        assert after[name].dtype == dtype
        assert torch.equal(after[name], tensor), name


@settings(max_examples=50, deadline=None)
@given(
    groups=st.integers(1, 4),
    per_group=st.integers(1, 5),
    head_dim=st.integers(1, 4),
    hidden=st.integers(1, 3),
)
def test_qkv_goes_group_by_group_query_key_value(
    groups: int, per_group: int, head_dim: int, hidden: int
) -> None:
    param = qkv_param(groups, per_group, head_dim, hidden)
    q, k, v = (numbered(*shape, start=1000 * i) for i, shape in enumerate(param.hf_shapes))
    expected = []
    for group in range(groups):  # the slow and obvious way
        for head in range(per_group):
            first = (group * per_group + head) * head_dim
            expected += [q[first + i] for i in range(head_dim)]
        for heads in (k, v):
            expected += [heads[group * head_dim + i] for i in range(head_dim)]
    whole = to_megatron(param, (q, k, v))
    assert torch.equal(whole, torch.stack(expected))
    for mine, original in zip(to_hf(param, whole), (q, k, v), strict=True):
        assert torch.equal(mine, original)


def test_a_rank_of_gate_up_holds_its_gate_above_its_up() -> None:
    gate, up = numbered(8, 3), numbered(8, 3, start=100)
    whole = to_megatron(GATE_UP, (gate, up))
    assert torch.equal(whole, torch.cat([gate, up]))
    assert torch.equal(shard(GATE_UP, whole, 1, 4), torch.cat([gate[2:4], up[2:4]]))


def test_with_fewer_key_value_heads_than_ranks_rows_are_cut_evenly() -> None:
    param = qkv_param(groups=1, per_group=6, head_dim=4, hidden=2)
    whole = numbered(*param.shape)
    assert torch.equal(shard(param, whole, 2, 4), whole[16:24])


def test_row_parallel_is_cut_along_its_second_dimension_and_norms_not_at_all() -> None:
    assert torch.equal(shard(ROW, numbered(3, 8), 1, 2), numbered(3, 8)[:, 4:])
    assert torch.equal(shard(NORM, numbered(3), 1, 2), numbered(3))


def test_vocabulary_padding_is_zero_and_goes_away() -> None:
    head = numbered(131, 3, start=1)
    whole = to_megatron(VOCAB, [head])
    assert torch.equal(whole[:131], head)
    assert not whole[131:].any()
    assert torch.equal(to_hf(VOCAB, whole)[0], head)


@given(vocab=st.integers(1, 300_000), log_tp=st.integers(0, 7))
def test_padded_vocabulary_is_the_same_for_every_usual_tp(vocab: int, log_tp: int) -> None:
    padded = padded_vocab_size(vocab, 2**log_tp)
    assert padded == padded_vocab_size(vocab)
    assert vocab <= padded < vocab + 128
    assert padded % 2**log_tp == 0


def test_padded_vocabulary_divides_by_an_unusual_tp() -> None:
    assert padded_vocab_size(130, 3) == 384
    assert padded_vocab_size(151936) == 151936


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: to_megatron(ROW, [numbered(3, 9)]), "down has shape [3, 9], expected [3, 8]"),
        (
            lambda: to_megatron(GATE_UP, [numbered(8, 3), numbered(8, 3).half()]),
            "up is torch.float16, but gate is torch.float32",
        ),
        (
            lambda: to_hf(VOCAB, numbered(131, 3)),
            "output_layer.weight has shape [131, 3], expected",
        ),
        (
            lambda: shard(GATE_UP, numbered(16, 3), 0, 3),
            "linear_fc1.weight: tensor parallelism 3 does not divide its dimension 0 of 8",
        ),
        (lambda: shard(ROW, numbered(3, 4), 0, 2), "has shape [3, 4], expected [3, 8]"),
        (lambda: unshard(ROW, [numbered(3, 4), numbered(3, 5)]), "part 1 of 2 has shape [3, 5]"),
        (
            lambda: unshard(NORM, [numbered(2)]),
            "final_layernorm.weight has shape [2], expected [3]",
        ),
    ],
)
def test_misfits_are_refused_by_name_and_shape(make, says: str) -> None:
    with pytest.raises(UserError) as refusal:
        make()
    assert says in str(refusal.value)


def test_a_parameter_cannot_be_changed() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        ROW.split_dim = 0  # type: ignore[misc]
