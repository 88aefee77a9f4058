"""The schedules against the method's table, and a user's own."""

from __future__ import annotations

import math
import typing

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_gpc.algo.schedules import (
    SCHEDULES,
    CheckedSchedule,
    OscillatorySchedule,
    PhaseSchedule,
    check_schedule,
)
from megatron_gpc.config import ClipConfig
from megatron_gpc.errors import PartError, UserError

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
    bounds = CheckedSchedule(ClipConfig(schedule=schedule), T).bounds(k, entropy=1.0)
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
    bounds = CheckedSchedule(ClipConfig(schedule="static", eps_high=0.28), T).bounds(7, 1.0)
    assert (bounds.upper_slope, bounds.upper_intercept) == (0.0, 1.28)
    assert (bounds.lower_slope, bounds.lower_intercept) == (0.0, 0.8)


def raised(bounds) -> bool:
    """Whether OD is in its entropy-raising half: Hi(p) above, eps_low below."""
    raising = bounds.upper_slope == -0.25
    assert (bounds.lower_slope == 0.0) == raising
    return raising


def test_od_is_not_moved_by_what_was_not_measured():
    schedule = OscillatorySchedule(ClipConfig(schedule="od"), T)
    assert not raised(schedule.bounds(0, math.nan))
    assert schedule.state() == {"s": 0, "initial_entropy": None}
    schedule.bounds(1, 2.0)
    assert raised(schedule.bounds(2, 0.1))
    before = schedule.state()
    for entropy in (math.nan, math.inf):
        assert raised(schedule.bounds(3, entropy)) and schedule.state() == before


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


METRICS = "def metrics(self): return {'x': 'y'}\n    "
OWN = """
from megatron_gpc.algo.clipping import affine_bounds
from megatron_gpc.types import Bounds

class Own:
    def __init__(self, clip, steps, fail_at=None):
        self.eps, self.steps, self.fail_at, self.asked = clip.eps_high, steps, fail_at, 0
    def bounds(self, k, entropy):
        self.asked += 1
        if k == self.fail_at:
            raise ValueError("not\\ntoday")
        return affine_bounds((0.0, self.eps * k / self.steps), (0.0, 0.2))
    def state(self):
        return {"asked": self.asked}
    def restore(self, state):
        self.asked = state["asked"]
"""


@pytest.fixture
def own(tmp_path):
    """own(text, **arguments): the section `clip` with a schedule that a file of `text` defines."""

    def make(text=OWN, **arguments):
        (tmp_path / "own.py").write_text(text)
        return ClipConfig(schedule=f"{tmp_path}/own.py:Own", schedule_arguments=arguments)

    return make


def test_a_users_schedule_is_built_asked_and_restored(own):
    clip = own()
    check_schedule(clip, T)
    schedule = CheckedSchedule(clip, T)
    assert schedule.bounds(50, 1.0).eps_high_at(0.3) == pytest.approx(0.1)
    again = CheckedSchedule(clip, T)
    again.restore(schedule.state())
    assert again.state() == {"asked": 1}


@pytest.mark.parametrize(
    ("change", "arguments", "says"),
    [
        (
            ("def restore", "def other"),
            {},
            "failed at restore({'asked': 3}): AttributeError",
        ),
        (("", ""), {"rate": 3}, "unexpected keyword argument 'rate'"),
        (("", ""), {"target": 3}, "clip.target is a key of its own; wanted is a class of"),
        (
            ("def bounds", "def thresholds"),
            {},
            "has no method bounds(k, entropy); wanted is a class",
        ),
        (("bounds(self, k, entropy", "bounds(self, k"), {}, "Own.bounds takes (k), but is called"),
        (("def state", "def other"), {}, "has no method state()"),
        (
            ("class Own", "Own = lambda step: 0.2\nclass Other"),
            {},
            "takes (step), but is called with",
        ),
        (("class Own", "Own = lambda clip, steps: 0.2\nclass Other"), {}, "has no method bounds"),
        (
            ("", ""),
            {"fail_at": 50},
            "bounds(k=50, entropy=0.0196078): ValueError: not today (",
        ),
        (("fail_at=None", ""), {}, "failed at its start: NameError: name 'fail_at'"),
        (("return affine", "return 2, affine"), {}, "expected megatron_gpc.types.Bounds"),
        (("self.eps * k", "float('nan') * k"), {}, "expected four numbers from -1e+18 to 1e+18"),
        (("self.eps * k", "1e30 * k"), {}, "expected four numbers from -1e+18 to 1e+18"),
        (("self.eps * k", "10**400 * k"), {}, "OverflowError"),
        (("self.eps * k", "str(k) * 1"), {}, "failed at bounds"),
        (("self.eps * k", "-2 * k"), {}, "is no interval of positive ratios"),
        (("(0.0, 0.2))", "(-3.0, -0.2))"), {}, "[1.2, 1] at p = 0 is no interval"),
        (('{"asked": self.asked}', "{1, 2}"), {}, "state() gave {1, 2}; expected a dictionary"),
        (
            ('{"asked": self.asked}', "{'x': float('inf')}"),
            {},
            "expected a dictionary, of what JSON",
        ),
        (('{"asked": self.asked}', "None"), {}, "state() gave None; expected a dictionary"),
        (('state["asked"]', "7"), {}, "after restore({'asked': 3}) its state() is {'asked': 7}"),
        (("self.asked += 1", "exit(5)"), {}, "failed at bounds(k=0, entropy=1): SystemExit: 5"),
        (("class Own", "Own = 3\nclass Other"), {}, "is 3, which cannot be called"),
        (
            ("def state", METRICS + "def state"),
            {},
            "metrics() gave {'x': 'y'}; expected numbers by",
        ),
        (("def state", METRICS.replace("'y'", "10**400") + "def state"), {}, "metrics() gave {'x'"),
        (
            ("def state", METRICS.replace("'y'", "1").replace("'x'", "'step'") + "def state"),
            {},
            "metrics() gave {'step': 1}; expected numbers by name, and no name `step`",
        ),
    ],
    ids=str,
)
def test_a_users_schedule_that_cannot_work_is_refused_by_name(own, change, arguments, says):
    clip = own(OWN.replace(*change), **arguments)
    with pytest.raises(UserError) as error:
        check_schedule(clip, T)
    text = str(error.value)
    assert text.startswith("clip.schedule: ") and "own.py" in text and "\n" not in text
    assert says in text


def test_an_error_in_mid_run_names_the_schedule_and_its_line(own):
    schedule = CheckedSchedule(own(fail_at=7), T)
    schedule.bounds(6, 1.0)
    with pytest.raises(
        PartError, match=r"own.py:Own failed at bounds\(k=7, .*own.py, line 11"
    ) as e:
        schedule.bounds(7, 1.0)
    assert isinstance(e.value.__cause__, ValueError)


def test_built_in_schedules_take_no_arguments_and_are_those_the_key_names():
    for name in SCHEDULES:
        target = 1.0 if name == "target" else None
        check_schedule(ClipConfig(schedule=name, target=target), 1)
        clip = ClipConfig(schedule=name, target=target, schedule_arguments={"x": 1})
        with pytest.raises(UserError, match=f"clip.schedule: {name} takes .*argument 'x'"):
            check_schedule(clip, T)
    clip = ClipConfig(schedule="target", target=1.0, schedule_arguments={"target": 0.9})
    with pytest.raises(UserError, match="arguments; clip.target is a key of its own$"):
        check_schedule(clip, T)
    (part,) = typing.get_type_hints(ClipConfig, include_extras=True)["schedule"].__metadata__
    assert set(part.built_in) == set(SCHEDULES)
    with pytest.raises(UserError, match="is no interval of positive ratios"):
        check_schedule(ClipConfig(schedule="hi", hi_slope=-2.0), T)
