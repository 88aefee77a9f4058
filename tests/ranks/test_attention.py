"""Packed attention is each sequence's own causal attention."""

from __future__ import annotations

import attention_ranks
import pytest
import torch


def naive(query, key, value, lengths, scale):
    """float64: softmax(q k^T scale) v, one sequence and one head at a time."""
    outputs = []
    for q_LHD, k_LGD, v_LGD in zip(*(x.split(lengths) for x in (query, key, value)), strict=True):
        length, heads = q_LHD.shape[:2]
        future = torch.ones(length, length, dtype=torch.bool).triu(1)
        of_heads = []
        for head in range(heads):
            group = head * k_LGD.shape[1] // heads
            scores = q_LHD[:, head] @ k_LGD[:, group].T * scale
            of_heads.append(scores.masked_fill(future, -torch.inf).softmax(-1) @ v_LGD[:, group])
        outputs.append(torch.cat(of_heads, -1))
    return torch.cat(outputs)


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.bfloat16, 2e-2)], ids=str
)
@pytest.mark.parametrize(
    ("lengths", "groups", "scale"),
    [
        ((7,), 4, None),
        ((90, 5, 5, 5, 1, 1), 2, None),  # three of one length are computed together
        ((1, 30, 1, 30), 1, 0.3),  # in no order
    ],
    ids=str,
)
def test_packed_attention_equals_one_sequence_at_a_time(
    pool, lengths, groups, scale, dtype, tolerance
):
    draw = torch.Generator().manual_seed(0)
    total, heads, size = sum(lengths), 4, 8
    parts = [torch.randn(total, n, size, generator=draw).to(dtype) for n in (heads, groups, groups)]
    weights_SE = torch.randn(total, heads * size, generator=draw).to(dtype)
    run = attention_ranks.packed_attention
    output, gradients = pool(1).run(run, tuple(parts), lengths, weights_SE, scale)[0]
    exact = [part.double().requires_grad_() for part in parts]
    want = naive(*exact, lengths, scale or size**-0.5)
    (want * weights_SE.double()).sum().backward()
    assert output.dtype == dtype
    for got, wanted in zip([output, *gradients], [want, *(x.grad for x in exact)], strict=True):
        assert (got.double() - wanted).abs().max() < tolerance * wanted.abs().max()


@pytest.mark.parametrize("masked", [False, True])
def test_a_copy_of_its_groups_keys_and_values_for_every_head_changes_nothing(pool, masked):
    """What is computed on a GPU where no kernel without scores takes groups."""
    draw = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(2, n, 9, 8, generator=draw) for n in (6, 2, 2))
    seen = torch.ones(9, 9, dtype=torch.bool).tril() if masked else None
    run = attention_ranks.grouped_and_not
    grouped, copied = pool(1).run(run, query, key, value, seen)[0]
    torch.testing.assert_close(copied, grouped, atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("name", "value"), [("attention_dropout", 0.1), ("softmax_type", "learnable")]
)
def test_attention_of_another_kind_is_refused_by_name(pool, name, value):
    (said,) = pool(1).run(attention_ranks.refusal, name, value)
    assert said.startswith(f"megatron.transformer.{name}={value} needs CUDA")
