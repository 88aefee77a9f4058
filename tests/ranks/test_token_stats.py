"""Vocab-parallel log-prob and entropy, and their gradients, against one float64 process."""

from __future__ import annotations

import math

import pytest
import ranks
import torch
from float64_stats import float64_stats
from pool import Pool
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_gpc.kernels.vocab_parallel import token_stats

VOCAB = 151  # real tokens; padded to 160, so that at TP 4 the last rank holds padding
PADDED = 160


class Exponentials(TorchDispatchMode):
    """Of how many rows of a vocabulary's logits at once the exponential is taken, as a list."""

    def __init__(self, vocab: int):
        super().__init__()
        self.vocab, self.rows = vocab, []

    def __enter__(self) -> list[int]:
        super().__enter__()
        return self.rows

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.aten.exp.default and args[0].shape[-1] == self.vocab:
            self.rows.append(len(args[0]))
        return function(*args, **(kwargs or {}))


def problem(dtype: torch.dtype, tokens: int = 23, scale: float = 4.0, seed: int = 0):
    draw = torch.Generator().manual_seed(seed)
    logits_TV = (scale * torch.randn(tokens, PADDED, generator=draw)).to(dtype)
    logits_TV[:, VOCAB:] = 50.0  # padding that would dominate if it were not masked
    targets_T = torch.randint(0, VOCAB, (tokens,), generator=draw)
    return logits_TV, targets_T, torch.randn(2, tokens, generator=draw)


def reference(logits_TV, targets_T, weights_2T, temperature, entropy_grad):
    x = logits_TV.double().requires_grad_()
    values = float64_stats(x[:, :VOCAB], targets_T, weights_2T, temperature, entropy_grad)
    return values, x.grad


@pytest.mark.parametrize("tp", [1, 2, 4])
@pytest.mark.parametrize("entropy_grad", [False, True])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_values_and_gradients_equal_the_reference(pool, tp, entropy_grad, temperature):
    given = problem(torch.float32)
    values, gradient = reference(*given, temperature, entropy_grad)
    results = pool(tp).run(ranks.token_stats_of, given, VOCAB, temperature, 5, entropy_grad)
    for got_values, _ in results:
        torch.testing.assert_close(got_values.double(), values, rtol=2e-6, atol=4e-6)
        assert torch.equal(got_values, results[0][0]), "every rank has the same numbers"
    got = torch.cat([gradient for _, gradient in results], dim=1)
    torch.testing.assert_close(got.double(), gradient, rtol=1e-5, atol=2e-6)
    assert (got[:, VOCAB:] == 0).all(), "padding has no gradient"


@pytest.mark.parametrize("tp", [1, 2, 4])
def test_bf16_logits_are_computed_in_fp32_and_their_gradient_is_bf16(pool, tp):
    given = problem(torch.bfloat16)
    values, gradient = reference(*given, 1.0, True)
    results = pool(tp).run(ranks.token_stats_of, given, VOCAB, 1.0, 7, True)
    torch.testing.assert_close(results[0][0].double(), values, rtol=2e-6, atol=4e-6)
    got = torch.cat([gradient for _, gradient in results], dim=1)
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got.double(), gradient, rtol=8e-3, atol=1e-6)


def test_peaked_and_shifted_distributions_keep_their_precision(pool):
    logits_TV, targets_T, weights = problem(torch.float32, scale=30.0)
    logits_TV += 1000.0  # far from 0, as untrained heads can be
    values, _ = reference(logits_TV, targets_T, weights, 1.0, False)
    for got, _ in pool(2).run(
        ranks.token_stats_of, (logits_TV, targets_T, weights), VOCAB, 1.0, 5, False
    ):
        torch.testing.assert_close(got[1].double(), values[1], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(got[0].double(), values[0], rtol=1e-5, atol=1e-4)


def test_the_largest_errors_are_stated(pool, record_property):
    """For the record: printed with -rP, and bounded."""
    given = problem(torch.float32, tokens=200)
    values, gradient = reference(*given, 1.0, True)
    for tp in (1, 2, 4):
        results = pool(tp).run(ranks.token_stats_of, given, VOCAB, 1.0, 64, True)
        got = torch.cat([gradient for _, gradient in results], dim=1)
        errors = {
            "log-prob": (results[0][0][0] - values[0]).abs().max().item(),
            "entropy": (results[0][0][1] - values[1]).abs().max().item(),
            "gradient": (got - gradient).abs().max().item(),
        }
        print(f"tp {tp}: largest error " + ", ".join(f"{k} {v:.1e}" for k, v in errors.items()))
        record_property(f"tp{tp}", str(errors))
        assert max(errors.values()) < 4e-6


def test_chunk_size_and_temperature_change_no_more_than_rounding(pool):
    given = problem(torch.float32)
    ((whole, _),) = pool(1).run(ranks.token_stats_of, given, VOCAB, 0.7, 1000, False)
    ((pieces, _),) = pool(1).run(ranks.token_stats_of, given, VOCAB, 0.7, 1, False)
    assert torch.equal(whole, pieces)


@pytest.mark.parametrize("vocab", [12, 40_000, 530_000])
def test_on_a_cpu_logits_in_fp32_fit_its_cache_and_a_small_vocabulary_is_not_cut(vocab):
    tokens = 30
    logits_TV = torch.zeros(tokens, vocab, dtype=torch.bfloat16)
    with Exponentials(vocab) as rows:
        stats = token_stats(logits_TV, torch.arange(tokens) % vocab, vocab_size=vocab)
    torch.testing.assert_close(stats.entropy_T, torch.full((tokens,), math.log(vocab)))
    assert rows == {12: [30], 40_000: [13, 13, 4], 530_000: [1] * 30}[vocab]


def test_a_rank_without_tokens_enters_the_collective_and_gets_empty_gradients(pool):
    given = problem(torch.float32, tokens=0)
    for values, gradient in pool(2).run(ranks.token_stats_of, given, VOCAB, 1.0, 5, True):
        assert values.shape == (4, 0) and gradient.shape == (0, PADDED // 2)


def test_one_collective_forward_none_backward_and_logits_untouched(pool: type[Pool]):
    given = problem(torch.float32)
    for calls, sizes, untouched in pool(2).run(ranks.collectives_of_token_stats, given, VOCAB):
        assert calls == ["all_gather_into_tensor"]
        assert sizes == [23 * 6], "six numbers a token, nothing of vocabulary size"
        assert untouched


def test_no_state_is_kept_for_the_entropy_gradient_unless_asked(pool):
    given = problem(torch.float32)
    (without,) = pool(1).run(ranks.saved_sizes_of_token_stats, given, VOCAB, False)
    (with_entropy,) = pool(1).run(ranks.saved_sizes_of_token_stats, given, VOCAB, True)
    assert len(with_entropy) == len(without) + 1
    # the logits themselves, saved by reference; everything else is a number a token
    assert sorted(without)[:-1] == [23] * 4 and max(without) == 23 * PADDED
