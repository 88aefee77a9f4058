"""The schedules against the method's table."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_gpc.algo.schedules import OscillatorySchedule, PhaseSchedule, make_schedule
from megatron_gpc.config import ClipConfig

T = 100
PROBABILITIES = (0.0, 0.3, 1.0)


def hi(p: float) -> float:
    return -0.25 * p + 0.5


def lo(p: float) -> float:
    return -0.13 * p + 0.3


def std(p: float) -> float:
    return 0.2


@pytest.mark.parametrize(
    ("schedule", "k", "high", "low"),
    [
        ("static", 0, std, std),
        ("static", 50, std, std),
        ("static", 100, std, std),
        ("hi", 0, hi, std),
        ("hi", 100, hi, std),
        ("lo", 0, std, lo),
        ("lo", 100, std, lo),
        ("id", 0, hi, std),
        ("id", 50, std, std),
        ("id", 100, std, std),
        ("did", 0, std, std),
        ("did", 50, hi, std),
        ("did", 100, hi, std),
        # one step into phase 2: lambda = -1/50
        ("id", 51, std, lambda p: 0.98 * lo(p) + 0.02 * 0.2),
        ("did", 51, hi, lambda p: 0.98 * lo(p) + 0.02 * 0.2),
        # halves of the phases: lambda = 1/2 and -1/2
        ("id", 25, lambda p: 0.5 * hi(p) + 0.1, std),
        ("id", 75, std, lambda p: 0.5 * lo(p) + 0.1),
        ("did", 25, lambda p: 0.5 * hi(p) + 0.1, std),
        ("did", 75, hi, lambda p: 0.5 * lo(p) + 0.1),
    ],
)
def test_thresholds_match_the_table(schedule, k, high, low):
    bounds = make_schedule(ClipConfig(schedule=schedule), T).bounds(k, entropy=1.0)
    for p in PROBABILITIES:
        assert bounds.eps_high_at(p) == pytest.approx(high(p), abs=1e-12)
        assert bounds.eps_low_at(p) == pytest.approx(low(p), abs=1e-12)


@given(st.integers(1, 1000), st.data())
def test_lambda_is_the_papers_at_an_even_split(steps, data):
    k = data.draw(st.integers(0, steps))
    schedule = PhaseSchedule(ClipConfig(schedule="id", phase_split=0.5), steps)
    assert schedule.phase_lambda(k) == pytest.approx(1 - 2 * k / steps, abs=1e-12)


@given(st.floats(0.05, 0.95), st.integers(1, 500), st.sampled_from(["id", "did"]))
def test_any_split_reaches_0_at_the_boundary_and_minus_1_at_the_end(split, steps, kind):
    schedule = PhaseSchedule(ClipConfig(schedule=kind, phase_split=split), steps)
    assert schedule.phase_lambda(0) == 1.0
    assert schedule.phase_lambda(steps) == pytest.approx(-1.0)
    values = [schedule.phase_lambda(k) for k in range(steps + 1)]
    assert values == sorted(values, reverse=True)


def test_static_uses_separate_thresholds_for_clip_higher():
    bounds = make_schedule(ClipConfig(schedule="static", eps_high=0.28), T).bounds(7, 1.0)
    assert (bounds.upper_slope, bounds.upper_intercept) == (0.0, 1.28)
    assert (bounds.lower_slope, bounds.lower_intercept) == (0.0, 0.8)


def raised(bounds) -> bool:
    """Whether OD is in its entropy-raising half: Hi(p) above, eps_low below."""
    raising = bounds.upper_slope == -0.25
    assert (bounds.lower_slope == 0.0) == raising
    return raising


def test_od_hysteresis_on_a_made_up_trace():
    schedule = OscillatorySchedule(ClipConfig(schedule="od"), T)
    # H_init 2.0: tau_low 0.4, tau_high(k) = 0.4 + 1.6 (1 - k/100)
    trace = [
        (0, 2.0, 0),  # tau_high 2.0: not above, s stays at its initial 0
        (10, 1.0, 0),  # between: unchanged
        (20, 0.4, 1),  # reaches tau_low
        (30, 1.0, 1),  # between (tau_high 1.52): unchanged
        (40, 1.37, 0),  # above tau_high 1.36
        (50, 0.9, 0),  # between (tau_high 1.2): unchanged
        (60, 0.39, 1),
        (90, 0.57, 0),  # the ceiling has come down to 0.56
        (100, 0.4, 1),  # at T both thresholds are 0.4
    ]
    for k, entropy, s in trace:
        assert raised(schedule.bounds(k, entropy)) == bool(s), (k, entropy)


def test_od_state_survives_a_restart():
    first = OscillatorySchedule(ClipConfig(schedule="od"), T)
    first.bounds(0, 2.0)
    first.bounds(20, 0.4)
    second = OscillatorySchedule(ClipConfig(schedule="od"), T)
    second.restore(first.state())
    assert raised(second.bounds(30, 1.0)) and raised(first.bounds(30, 1.0))
    assert second.state() == first.state() == {"s": 1, "initial_entropy": 2.0}
