"""Thresholds: both forms of the bound agree, and constants are PPO."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_gpc.algo.clipping import affine_bounds, probability_interval, ratio_interval

probability = st.floats(1e-6, 1.0)
hi = st.tuples(st.floats(-0.45, 0.45), st.floats(0.05, 1.0))
lo = st.tuples(st.floats(-0.3, 0.3), st.floats(0.05, 0.6))


@given(hi, lo, st.floats(1e-4, 1.0), st.floats(-2.0, 2.0))
def test_current_p_form_and_q_only_form_agree_token_for_token(hi, lo, q, log_ratio):
    bounds = affine_bounds(hi, lo)
    q_T = torch.tensor([q], dtype=torch.float64)
    p_T = (q_T * torch.tensor(log_ratio, dtype=torch.float64).exp()).clamp(max=1.0)
    lower_T, upper_T = ratio_interval(bounds, p_T)
    lowest_p_T, highest_p_T = probability_interval(bounds, q_T)
    # A token sitting on a bound to within rounding may fall on either side of it.
    if abs(p_T / q_T - upper_T) > 1e-12:
        assert bool(p_T / q_T <= upper_T) == bool(p_T <= highest_p_T)
    if abs(p_T / q_T - lower_T) > 1e-12:
        assert bool(p_T / q_T >= lower_T) == bool(p_T >= lowest_p_T)


def test_bounds_of_the_paper_at_both_ends():
    bounds = affine_bounds((-0.25, 0.5), (-0.13, 0.3))
    q_T = torch.tensor([1e-12, 1.0], dtype=torch.float64)
    lowest_T, highest_T = (p_T / q_T for p_T in probability_interval(bounds, q_T))
    torch.testing.assert_close(highest_T, torch.tensor([1.5, 1.2], dtype=torch.float64))
    torch.testing.assert_close(lowest_T, torch.tensor([0.7, 0.7 / 0.87], dtype=torch.float64))
    assert round(0.7 / 0.87, 3) == 0.805


def test_eps_reads_back_what_was_configured():
    bounds = affine_bounds((-0.25, 0.5), (-0.13, 0.3))
    assert abs(bounds.eps_high_at(0.5) - 0.375) < 1e-15
    assert abs(bounds.eps_low_at(0.5) - 0.235) < 1e-15


@given(st.floats(0.01, 0.9), st.floats(0.01, 0.9), probability)
def test_constant_thresholds_are_the_fp32_numbers_of_torch_clamp(eps_low, eps_high, p):
    lower_T, upper_T = ratio_interval(
        affine_bounds((0.0, eps_high), (0.0, eps_low)), torch.tensor([p])
    )
    far_T = torch.tensor([0.0, 100.0])
    textbook_T = torch.clamp(far_T, 1 - eps_low, 1 + eps_high)
    assert (lower_T.item(), upper_T.item()) == (textbook_T[0].item(), textbook_T[1].item())
