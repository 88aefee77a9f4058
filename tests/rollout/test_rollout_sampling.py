"""Sampling: the draw follows the distribution, and the seed decides it."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from megatron_gpc.errors import UserError
from megatron_gpc.server.sampling import SamplingParams, Uniforms, draw

LOGITS = torch.tensor([2.0, 1.0, 0.0, -1.0, -2.0])


def draws(count: int, **values: object) -> tuple[torch.Tensor, torch.Tensor]:
    """`count` tokens from LOGITS, at evenly spaced uniforms: the exact distribution, no chance."""
    u = (np.arange(count) + 0.5) / count
    return draw(LOGITS.repeat(count, 1), [SamplingParams(**values)] * count, u)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_frequencies_are_the_temperature_scaled_probabilities(temperature):
    tokens, logp = draws(10_000, temperature=temperature)
    expected = torch.softmax(LOGITS / temperature, -1)
    found = torch.bincount(tokens, minlength=5) / 10_000
    torch.testing.assert_close(found, expected, atol=2e-4, rtol=0)
    torch.testing.assert_close(logp, expected.log()[tokens])


@pytest.mark.parametrize(
    ("cut", "kept"),
    [
        ({"top_k": 2}, 2),
        ({"top_k": 1}, 1),
        ({"top_k": 99}, 5),
        ({"top_p": 0.5}, 1),
        ({"top_p": 0.7}, 2),
        ({"top_p": 0.9}, 3),
        ({"top_p": 0.9, "top_k": 2}, 2),
    ],
)
def test_top_k_and_top_p_cut_the_tail_but_not_the_logprobs(cut, kept):
    """softmax(LOGITS) is 0.64, 0.23, 0.09, 0.03, 0.01; the token that passes top_p is kept."""
    tokens, logp = draws(10_000, **cut)
    p = torch.softmax(LOGITS, -1)
    found = torch.bincount(tokens, minlength=5) / 10_000
    expected = torch.where(torch.arange(5) < kept, p / p[:kept].sum(), 0.0)
    torch.testing.assert_close(found, expected, atol=2e-4, rtol=0)
    torch.testing.assert_close(logp, p.log()[tokens])


def test_greedy_takes_the_mode_and_reports_temperature_1():
    tokens, logp = draws(3, temperature=0.0)
    assert tokens.tolist() == [0, 0, 0]
    torch.testing.assert_close(logp, torch.log_softmax(LOGITS, -1)[tokens])


def test_every_row_has_its_own_parameters():
    params = [SamplingParams(temperature=0.0), SamplingParams(top_k=2), SamplingParams()]
    tokens, _ = draw(LOGITS.repeat(3, 1), params, np.array([0.999, 0.999, 0.999]))
    assert tokens.tolist() == [0, 1, 4]


def test_the_largest_uniform_draws_a_token_that_is_possible():
    logits = torch.tensor([[0.1, 0.2, 0.3, -torch.inf, -torch.inf]])
    tokens, logp = draw(logits, [SamplingParams()], np.array([1 - 2.0**-53]))
    assert tokens.tolist() == [2] and torch.isfinite(logp).all()


def test_uniforms_follow_from_seed_index_and_position_alone():
    def first(count: int, seed: int, index: int) -> np.ndarray:
        made = Uniforms(seed, index)
        return np.array([made[i] for i in range(count)])

    long = first(1000, 7, 0)
    assert Uniforms(7, 0)[999] == long[999]
    assert np.array_equal(first(10, 7, 0), long[:10])
    assert not np.intersect1d(long, first(1000, 7, 1)).size
    assert not np.intersect1d(long, first(1000, 8, 0)).size
    philox = np.random.Philox(key=np.array([7, 0], dtype=np.uint64))
    assert np.array_equal(long, (philox.random_raw(1000) >> np.uint64(11)) * 2.0**-53)
    assert long.min() >= 0 and long.max() < 1 and abs(long.mean() - 0.5) < 0.05


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"temperature": float("nan")}, "temperature"),
        ({"temperature": "hot"}, "temperature"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_p": 1.1}, "top_p"),
        ({"top_k": 0}, "top_k"),
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"max_new_tokens": 1.5}, "max_new_tokens"),
        ({"max_new_tokens": 2, "min_new_tokens": 3}, "min_new_tokens"),
        ({"n": 0}, "n must"),
        ({"stop_token_ids": [1, "x"]}, "stop_token_ids"),
        ({"sampling_seed": -1}, "sampling_seed"),
        ({"ignore_eos": 1}, "ignore_eos"),
        ({"stop": [".", 1]}, "stop has"),
        ({"stop": ""}, "stop has"),
        ({"stops": "."}, "'stops'"),
    ],
)
def test_bad_parameter_is_refused_by_name(values, named):
    with pytest.raises(UserError, match=named):
        SamplingParams.parse(values)
