"""Importance weights of samples that another distribution made."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_gpc.algo.correction import correction_weights
from megatron_gpc.config import TrainConfig
from megatron_gpc.types import RolloutBatch

OLD_T = torch.tensor([-1.0, -2.0, -0.5, -3.0, -1.0])
ROLLOUT_T = torch.tensor([-1.0, -3.5, -0.7, -1.0, -1.2])
LENGTHS_N = torch.tensor([2, 3])
RATIOS = [math.exp(d) for d in (0.0, 1.5, 0.2, -2.0, 0.2)]


def weights_of(old_T, rollout_T, lengths_N, kind, level, cap):
    none_N = torch.empty(0)
    batch = RolloutBatch(none_N, none_N, none_N, lengths_N, rollout_T, none_N, none_N)
    settings = TrainConfig(correction=kind, correction_level=level, correction_cap=cap)
    return correction_weights(batch, old_T, settings)


def weights(kind: str, level: str, cap: float = 2.0) -> list[float]:
    return weights_of(OLD_T, ROLLOUT_T, LENGTHS_N, kind, level, cap).tolist()


def test_without_correction_every_weight_is_one():
    assert weights("none", "token") == [1.0] * 5


def test_token_weights_are_ratios_truncated_or_masked():
    want = [min(r, 2.0) for r in RATIOS]
    assert weights("truncate", "token") == pytest.approx(want)
    assert weights("mask", "token") == pytest.approx([1.0, 0.0, RATIOS[2], 0.0, RATIOS[4]])


def test_sequence_weights_are_the_product_over_a_response():
    first, second = math.exp(1.5), math.exp(-1.6)
    assert weights("truncate", "sequence", 100.0) == pytest.approx([first] * 2 + [second] * 3)
    assert weights("truncate", "sequence") == pytest.approx([2.0] * 2 + [second] * 3)
    assert weights("mask", "sequence", 5.0) == pytest.approx([first] * 2 + [second] * 3)
    assert weights("mask", "sequence", 4.5) == pytest.approx([first] * 2 + [0.0] * 3)


def test_no_gradient_flows_through_a_weight():
    old_T = OLD_T.clone().requires_grad_()
    made_T = weights_of(old_T, ROLLOUT_T, LENGTHS_N, "truncate", "token", 2.0)
    assert not made_T.requires_grad


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_weighted_means_under_the_rollout_are_means_under_the_old_policy(level):
    """E_mu[w f] = E_q[f], for single tokens drawn from mu, with a cap that does not act."""
    draw = torch.Generator().manual_seed(0)
    q_V, mu_V = torch.rand(5, generator=draw).softmax(0), torch.rand(5, generator=draw).softmax(0)
    tokens_T = torch.multinomial(mu_V, 200_000, replacement=True, generator=draw)
    f_V = torch.arange(5.0)
    w_T = weights_of(
        q_V.log()[tokens_T], mu_V.log()[tokens_T], torch.ones_like(tokens_T), "truncate", level, 50
    )
    assert (w_T * f_V[tokens_T]).mean() == pytest.approx(float((q_V * f_V).sum()), rel=0.01)


logps = st.one_of(st.floats(-50, 0, width=32), st.sampled_from([-math.inf, -3.4e38, -1e3, 0.0]))


@given(
    st.lists(st.lists(st.tuples(logps, logps), min_size=1, max_size=4), min_size=1, max_size=3),
    st.sampled_from(["truncate", "mask"]),
    st.sampled_from(["token", "sequence"]),
)
def test_weights_are_finite_and_right_whatever_the_log_probs(responses, kind, level):
    """Probabilities of 0 under q, mu or both, and products that overflow."""
    cap = 2.0

    def weight(pairs):
        # equal ones cancel; a factor of 0 outweighs one of infinity, which cannot have been drawn
        logs = [q - mu for q, mu in pairs if q != mu]
        w = math.exp(min(sum(logs), 700)) if -math.inf not in logs else 0.0
        if kind == "truncate":
            return min(w, cap)
        return w if 1 / cap <= w <= cap else 0.0

    want = [
        weight(response if level == "sequence" else [pair])
        for response in responses
        for pair in response
    ]
    old_T, rollout_T = torch.tensor([pair for response in responses for pair in response]).T
    lengths_N = torch.tensor([len(response) for response in responses])
    got_T = weights_of(old_T, rollout_T, lengths_N, kind, level, cap)
    borders = [abs(math.log(w) - b) < 1e-3 for w in want if w for b in (-math.log(2), math.log(2))]
    assert got_T.isfinite().all()
    if kind == "truncate" or not any(borders):  # on the border rounding decides
        torch.testing.assert_close(got_T, torch.tensor(want), rtol=1e-4, atol=1e-30)
