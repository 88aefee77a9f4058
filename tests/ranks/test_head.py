"""The head without whole logits, and its gradients, against one float64 process."""

from __future__ import annotations

import importlib.util

import head_ranks
import pytest
import torch
from float64_stats import float64_stats

VOCAB = 151  # real tokens; padded to 160, so that at TP 4 the last rank holds padding
PADDED = 160
HIDDEN = 24
NO_TRITON = importlib.util.find_spec("triton") is None
BACK_ENDS = [
    "rows",
    pytest.param("rows_triton", marks=pytest.mark.skipif(NO_TRITON, reason="there is no Triton")),
]


def problem(dtype: torch.dtype = torch.float32, tokens: int = 23, scale: float = 1.0):
    draw = torch.Generator().manual_seed(0)
    hidden_TD = (scale * torch.randn(tokens, HIDDEN, generator=draw)).to(dtype)
    weight_VD = torch.randn(PADDED, HIDDEN, generator=draw).to(dtype)
    weight_VD[VOCAB:] *= 50.0  # padding that would dominate if it took part
    targets_T = torch.randint(0, VOCAB, (tokens,), generator=draw)
    targets_T[:2] = torch.tensor([0, VOCAB - 1])[:tokens]
    return hidden_TD, weight_VD, targets_T, torch.randn(2, tokens, generator=draw)


def reference(hidden_TD, weight_VD, targets_T, weights_2T, temperature, entropy_grad):
    """float64, whole vocabulary, autograd: values [4, T], gradients of hidden states and weight.

    Logits and their gradient are rounded as the head's are: to the dtype of its tensors.
    """
    h, w = hidden_TD.double().requires_grad_(), weight_VD.double().requires_grad_()
    x = h @ w[:VOCAB].T
    x = x + (x.detach().to(hidden_TD.dtype).double() - x.detach())
    x.register_hook(lambda gradient: gradient.to(hidden_TD.dtype).double())
    values = float64_stats(x, targets_T, weights_2T, temperature, entropy_grad)
    return values, h.grad, w.grad


def options(entropy_grad=True, keep_logits=False, chunk=None, temperature=1.0):
    asked = {"entropy_grad": entropy_grad, "keep_logits": keep_logits, "chunk": chunk}
    return {**asked, "temperature": temperature, "vocab_size": VOCAB}


@pytest.mark.parametrize("rows", BACK_ENDS)
@pytest.mark.parametrize("tp", [1, 2, 4])
@pytest.mark.parametrize("chunk", [16, None])
@pytest.mark.parametrize("keep_logits", [False, True])
@pytest.mark.parametrize(("temperature", "entropy_grad"), [(1.0, False), (0.7, True)])
def test_values_and_gradients_equal_float64(
    pool, rows, tp, chunk, keep_logits, temperature, entropy_grad
):
    given = problem()
    values, hidden, weight = reference(*given, temperature, entropy_grad)
    asked = options(entropy_grad, keep_logits, chunk, temperature)
    results = pool(tp).run(head_ranks.head_stats_of, given, asked, rows)
    for result in results:
        torch.testing.assert_close(result["values"].double(), values, rtol=2e-6, atol=1e-5)
        assert torch.equal(result["values"], results[0]["values"]), "ranks have the same numbers"
        torch.testing.assert_close(result["hidden"].double(), hidden, rtol=1e-5, atol=2e-5)
    got = torch.cat([result["weight"] for result in results])
    torch.testing.assert_close(got.double(), weight, rtol=1e-5, atol=2e-5)
    assert (got[VOCAB:] == 0).all(), "padding has no gradient"


@pytest.mark.parametrize("rows", BACK_ENDS)
@pytest.mark.parametrize("tp", [1, 4])
@pytest.mark.parametrize("keep_logits", [False, True])
def test_bf16_is_rounded_where_matrix_products_are_and_nowhere_else(pool, rows, tp, keep_logits):
    given = problem(torch.bfloat16, scale=0.3)
    values, hidden, weight = reference(*given, 0.9, True)
    asked = options(keep_logits=keep_logits, chunk=32, temperature=0.9)
    results = pool(tp).run(head_ranks.head_stats_of, given, asked, rows)
    # a logit may be rounded the other way: the product adds up in fp32, in another order
    torch.testing.assert_close(results[0]["values"].double(), values, rtol=2e-3, atol=4e-3)
    for got, want in (
        (results[0]["hidden"], hidden),
        (torch.cat([result["weight"] for result in results]), weight),
    ):
        assert got.dtype == torch.bfloat16
        assert (got.double() - want).abs().max() < 0.01 * want.abs().max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("keep_logits", [False, True])
def test_the_gradient_of_the_weight_is_added_where_megatron_core_adds_up(pool, dtype, keep_logits):
    given, asked = problem(dtype), options(keep_logits=keep_logits, chunk=32)
    plain = pool(2).run(head_ranks.head_stats_of, given, asked, "rows")
    added = pool(2).run(head_ranks.head_stats_of, given, asked, "rows", True)
    for one, other in zip(plain, added, strict=True):
        assert other["added"] and not one["added"]
        assert torch.equal(one["values"], other["values"])
        close = {"rtol": 1e-2, "atol": 1e-2} if dtype is torch.bfloat16 else {}
        torch.testing.assert_close(other["weight"], one["weight"].float(), **close)


@pytest.mark.parametrize("rows", BACK_ENDS)
def test_kept_logits_and_logits_made_again_give_the_same_bits(pool, rows):
    given = problem()
    (kept,), (again,) = (
        pool(1).run(head_ranks.head_stats_of, given, options(keep_logits=keep, chunk=32), rows)
        for keep in (True, False)
    )
    for name in ("values", "hidden", "weight"):
        assert torch.equal(kept[name], again[name]), name


@pytest.mark.parametrize("rows", BACK_ENDS)
def test_peaked_and_shifted_distributions_keep_their_precision(pool, rows):
    hidden_TD, weight_VD, *rest = problem(scale=6.0)
    hidden_TD[:, 0], weight_VD[:, 0] = 32.0, 32.0  # adds 1024 to every logit, exactly
    given = (hidden_TD, weight_VD, *rest)
    values, hidden, _ = reference(*given, 1.0, True)
    for result in pool(2).run(head_ranks.head_stats_of, given, options(chunk=32), rows):
        # of logits near 1024 fp32 keeps 6e-5
        torch.testing.assert_close(result["values"].double(), values, rtol=1e-3, atol=1e-3)
        assert (result["hidden"] - hidden).abs().max() < 1e-3 * hidden.abs().max()


@pytest.mark.parametrize("rows", BACK_ENDS)
@pytest.mark.parametrize("keep_logits", [False, True])
def test_a_batch_without_tokens_enters_the_collectives_and_adds_nothing(pool, rows, keep_logits):
    given, asked = problem(tokens=0), options(keep_logits=keep_logits)
    for result in pool(2).run(head_ranks.head_stats_of, given, asked, rows):
        assert result["values"].shape == (4, 0) and result["hidden"].shape == (0, HIDDEN)
        assert (result["weight"] == 0).all()
        assert [name for name, _ in result["calls"]] == ["all_gather_into_tensor", "all_reduce"]


def test_ranks_exchange_six_numbers_a_token_and_the_gradient_of_hidden_states(pool):
    for result in pool(2).run(head_ranks.head_stats_of, problem(), options(chunk=16), "rows"):
        assert result["calls"] == [
            ("all_gather_into_tensor", 23 * 6),
            ("all_reduce", 23 * HIDDEN),
        ]
