"""The default objective against the textbook, and where its gradient must vanish."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_gpc.algo.clipping import affine_bounds, ratio_interval
from megatron_gpc.algo.losses import LossInputs, LossOutputs
from megatron_gpc.algo.losses.clip import clip
from megatron_gpc.types import Bounds, TokenStreams

seeds = st.integers(0, 10_000)


def tokens(seed: int, count: int = 64) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(seed)
    old_logp_T = -3 * torch.rand(count, generator=draw)
    logp_T = (old_logp_T + 0.4 * torch.randn(count, generator=draw)).clamp(max=-1e-3)
    return logp_T.requires_grad_(), old_logp_T, torch.randn(count, generator=draw)


def policy_loss(
    logp_T: torch.Tensor, old_logp_T: torch.Tensor, adv_T: torch.Tensor, bounds: Bounds
) -> LossOutputs:
    """The default loss of tokens that are one sample."""
    none_T, tokens = torch.zeros_like(old_logp_T), len(old_logp_T)
    streams = TokenStreams(
        *(old_logp_T, old_logp_T, adv_T, none_T + 1, none_T.long(), none_T.long() + tokens, 1)
    )
    return clip(LossInputs(logp_T, none_T, adv_T, bounds, streams, 1, tokens))


@given(seeds, st.floats(0.01, 0.6), st.floats(0.01, 0.6))
def test_constant_thresholds_equal_textbook_ppo_bit_for_bit(seed, eps_low, eps_high):
    logp_T, old_logp_T, adv_T = tokens(seed)
    ours = policy_loss(logp_T, old_logp_T, adv_T, affine_bounds((0.0, eps_high), (0.0, eps_low)))
    ours.loss_sum.backward()
    reference_T = logp_T.detach().clone().requires_grad_()
    ratio_T = torch.exp(reference_T - old_logp_T)
    loss = -torch.min(
        ratio_T * adv_T, torch.clamp(ratio_T, 1 - eps_low, 1 + eps_high) * adv_T
    ).sum()
    loss.backward()
    assert torch.equal(ours.loss_sum, loss)
    assert torch.equal(logp_T.grad, reference_T.grad)


@given(seeds)
def test_tokens_clipped_on_the_pessimistic_side_have_exactly_zero_gradient(seed):
    logp_T, old_logp_T, adv_T = tokens(seed)
    result = policy_loss(logp_T, old_logp_T, adv_T, affine_bounds((-0.25, 0.5), (-0.13, 0.3)))
    result.loss_sum.backward()
    clipped_T = result.clipped_low_T | result.clipped_high_T
    assert clipped_T.any()
    assert (logp_T.grad[clipped_T] == 0).all()
    free_T = ~clipped_T & (adv_T != 0)
    expected_T = -result.ratio_T * adv_T
    torch.testing.assert_close(logp_T.grad[free_T], expected_T[free_T])


@given(seeds)
def test_value_and_gradient_equal_a_float64_scalar_reference(seed):
    logp_T, old_logp_T, adv_T = tokens(seed)
    a_hi, b_hi, a_lo, b_lo = -0.25, 0.5, -0.13, 0.3
    result = policy_loss(logp_T, old_logp_T, adv_T, affine_bounds((a_hi, b_hi), (a_lo, b_lo)))
    result.loss_sum.backward()
    loss, gradient = 0.0, []
    for logp, old, adv in zip(
        logp_T.double().tolist(), old_logp_T.double().tolist(), adv_T.double().tolist(), strict=True
    ):
        p, r = math.exp(logp), math.exp(logp - old)
        bounded = min(max(r, 1 - (a_lo * p + b_lo)), 1 + (a_hi * p + b_hi))
        loss -= min(r * adv, bounded * adv)
        gradient.append(-r * adv if r * adv <= bounded * adv else 0.0)
    assert abs(result.loss_sum.item() - loss) < 1e-4
    torch.testing.assert_close(logp_T.grad, torch.tensor(gradient), rtol=1e-5, atol=1e-6)


def test_no_gradient_flows_through_the_threshold():
    logp_T = torch.tensor([-0.5], requires_grad=True)
    lower_T, upper_T = ratio_interval(affine_bounds((-0.25, 0.5), (-0.13, 0.3)), logp_T.exp())
    assert not lower_T.requires_grad and not upper_T.requires_grad


def test_clip_counts_need_the_right_sign_of_the_advantage():
    old_logp_T = torch.full((4,), -2.0)
    logp_T = torch.tensor([-1.0, -1.0, -3.0, -3.0])
    adv_T = torch.tensor([1.0, -1.0, 1.0, -1.0])
    result = policy_loss(logp_T, old_logp_T, adv_T, affine_bounds((0.0, 0.2), (0.0, 0.2)))
    assert result.clipped_high_T.tolist() == [True, False, False, False]
    assert result.clipped_low_T.tolist() == [False, False, False, True]


def test_no_tokens_give_a_zero_loss_that_still_has_a_gradient():
    logp_T = torch.zeros(0, requires_grad=True)
    none_T = torch.zeros(0)
    result = policy_loss(logp_T, none_T, none_T, affine_bounds((0.0, 0.2), (0.0, 0.2)))
    result.loss_sum.backward()
    assert result.loss_sum.item() == 0.0 and logp_T.grad.shape == (0,)


def textbook(logp_T, old_logp_T, adv_T, bounds):
    """The formula as it is written in fp32; gradients by autograd."""
    ratio_T = torch.exp(logp_T - old_logp_T)
    lower_T, upper_T = ratio_interval(bounds, logp_T.detach().exp())
    clipped_T = torch.clamp(ratio_T, lower_T, upper_T)
    return -torch.min(ratio_T * adv_T, clipped_T * adv_T).sum()


MOVING = affine_bounds((-0.25, 0.5), (-0.13, 0.3))
log_ratios = st.one_of(
    st.floats(-30, 30, width=32),
    st.floats(-1e38, 1e38).map(lambda x: torch.tensor(x).item()),  # as fp32 rounds it
    st.sampled_from([-math.inf, -104.0, -88.0, 0.0, 88.0, 89.0, 1e4, 3e38, math.inf]),
)
advantages = st.one_of(st.floats(-100, 100, width=32), st.sampled_from([-1.0, 0.0, 1.0]))


@given(
    st.lists(
        st.tuples(st.floats(-29, 0, width=32), st.floats(-29, 0, width=32), advantages), min_size=1
    )
)
def test_ordinary_ratios_equal_the_textbook_bit_for_bit(rows):
    logp_T, old_logp_T, adv_T = torch.tensor(rows).T
    ours_T, reference_T = (logp_T.clone().requires_grad_() for _ in range(2))
    ours = policy_loss(ours_T, old_logp_T, adv_T, MOVING).loss_sum
    reference = textbook(reference_T, old_logp_T, adv_T, MOVING)
    ours.backward()
    reference.backward()
    assert torch.equal(ours, reference)
    assert torch.equal(ours_T.grad, reference_T.grad)


@given(st.lists(st.tuples(log_ratios, advantages), min_size=1))
def test_loss_and_gradient_are_finite_and_right_at_any_ratio(rows):
    """Held to float64, in which ratios end alike; the larger of p and q is 1."""
    log_ratio_T, adv_T = torch.tensor(rows).T
    logp_T = log_ratio_T.clamp(max=0).requires_grad_()
    result = policy_loss(logp_T, -log_ratio_T.clamp(min=0), adv_T, MOVING)
    result.loss_sum.backward()
    loss, gradient = 0.0, []
    for log_ratio, adv in zip(log_ratio_T.tolist(), adv_T.tolist(), strict=True):
        p, r = math.exp(min(log_ratio, 0)), math.exp(min(log_ratio, 30))
        if log_ratio == math.inf:
            r = 1e30
        bounded = max(r, 1 - (-0.13 * p + 0.3))
        bounded = min(bounded, 1 + (-0.25 * p + 0.5))
        loss -= min(r * adv, bounded * adv)
        gradient.append(-r * adv if r * adv <= bounded * adv else 0.0)
    assert result.ratio_T.isfinite().all()
    torch.testing.assert_close(
        result.loss_sum.double(), torch.tensor(loss).double(), rtol=1e-5, atol=1e-4
    )
    torch.testing.assert_close(logp_T.grad, torch.tensor(gradient), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("log_ratio", [88.0, 89.0, 1000.0, 3e38, math.inf])
@pytest.mark.parametrize("adv", [-1e4, -1.0, 0.0, 1.0])
def test_an_overflowing_ratio_has_the_clipped_loss_and_no_gradient_unless_a_is_negative(
    log_ratio, adv
):
    count = 10_000
    logp_T = torch.full((count,), -1.0, requires_grad=True)
    bounds = affine_bounds((0.0, 0.2), (0.0, 0.2))
    result = policy_loss(
        logp_T, torch.full((count,), -1.0 - log_ratio), torch.full((count,), adv), bounds
    )
    result.loss_sum.backward()
    if adv < 0:
        assert 0 < result.loss_sum < torch.inf
        assert (logp_T.grad > 0).all() and logp_T.grad.isfinite().all()
    else:
        assert result.loss_sum.item() == pytest.approx(-1.2 * adv * count)
        assert (logp_T.grad == 0).all()


def test_broken_log_probs_are_not_hidden():
    nan_T = torch.tensor([torch.nan])
    one_T, bounds = torch.ones(1), affine_bounds((0.0, 0.2), (0.0, 0.2))
    assert policy_loss(nan_T, -one_T, one_T, bounds).loss_sum.isnan()
    assert policy_loss(-one_T, nan_T, one_T, bounds).loss_sum.isnan()
