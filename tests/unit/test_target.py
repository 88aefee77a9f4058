"""Entropy along a curve: what is steered, on a made-up policy, and what is refused."""

from __future__ import annotations

import json
import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from megatron_gpc.algo.schedules import CheckedSchedule, check_schedule
from megatron_gpc.algo.target import TargetSchedule, check_target, target_at
from megatron_gpc.config import ClipConfig
from megatron_gpc.errors import UserError
from megatron_gpc.metrics.reach import PATIENCE, Reach

T = 60
RISE_AND_FALL = ((0.0, "100%"), (0.5, "115%"), (1.0, "75%"))
entropies = st.floats(0.01, 10.0) | st.just(math.nan)


def clip(target, **keys) -> ClipConfig:
    return ClipConfig(schedule="target", target=target, **keys)


@pytest.mark.parametrize(
    ("target", "heights"),
    [
        (1.5, (1.5, 1.5, 1.5)),
        ("80%", (1.6, 1.6, 1.6)),
        (((0.0, "100%"), (0.5, 3.0), (1.0, "50%")), (2.0, 2.5, 1.0)),
        (((0.5, 1.0),), (1.0, 1.0, 1.0)),
        (((0.25, 1.0), (0.75, 2.0)), (1.0, 1.0, 2.0)),  # level before and after
        (((0.25, 3.0), (0.75, 1.0)), (3.0, 3.0, 1.0)),
    ],
)
def test_the_curve_is_straight_between_its_points_and_level_outside(target, heights):
    target = clip(target).target
    found = [target_at(target, done, first=2.0) for done in (0.0, 0.25, 1.0)]
    assert found == pytest.approx(heights)


@pytest.mark.parametrize(
    ("entropy", "high", "low"),
    [
        (0.2, (-0.25, 0.5), (0.0, 0.2)),  # far below: Hi(p), standard
        (5.0, (0.0, 0.2), (-0.13, 0.3)),  # far above: standard, Lo(p)
        (1.0, (0.0, 0.2), (0.0, 0.2)),
        (0.95, (-0.125, 0.35), (0.0, 0.2)),  # half of the way
        (1.05, (0.0, 0.2), (-0.065, 0.25)),
    ],
)
def test_the_error_opens_one_threshold(entropy, high, low):
    schedule = CheckedSchedule(clip(1.0, target_gain=10.0, target_integral_gain=0.0), T)
    bounds = schedule.bounds(0, entropy)
    for p in (0.0, 0.4, 1.0):
        assert bounds.eps_high_at(p) == pytest.approx(high[0] * p + high[1])
        assert bounds.eps_low_at(p) == pytest.approx(low[0] * p + low[1])


@given(st.lists(entropies, max_size=80), st.sampled_from([0.7, "90%", RISE_AND_FALL]), st.data())
def test_whatever_is_measured_lambda_and_integral_stay_within_1(trace, target, data):
    gains = st.floats(0.01, 100.0)
    keys = {"target_gain": data.draw(gains), "target_integral_gain": data.draw(gains)}
    schedule = TargetSchedule(clip(target, **keys), T)
    for k, entropy in enumerate(trace):
        before = schedule.state()
        schedule.bounds(k % T, entropy)
        assert abs(schedule.clip_lambda) <= 1 and abs(schedule.integral) <= 1
        if math.isnan(entropy):  # what was not measured moves nothing
            assert schedule.state() == before


@given(st.lists(st.floats(0.1, 3.0), min_size=1, max_size=80), st.floats(0.05, 2.0))
def test_gains_are_free_of_scale(trace, scale):
    one = TargetSchedule(clip(1.0), T)
    other = TargetSchedule(clip(scale), T)
    for k, entropy in enumerate(trace):
        one.bounds(k % T, entropy), other.bounds(k % T, scale * entropy)
        assert other.clip_lambda == pytest.approx(one.clip_lambda, abs=1e-6)


@given(st.lists(entropies, min_size=1, max_size=50), st.integers(0, 49))
def test_a_schedule_that_is_restored_from_json_goes_on_bit_for_bit(trace, cut):
    whole, part = (CheckedSchedule(clip(RISE_AND_FALL), T) for _ in range(2))
    expected = [(whole.bounds(k, h), str(whole.metrics())) for k, h in enumerate(trace)]
    cut = min(cut, len(trace) - 1)
    for k in range(cut):
        part.bounds(k, trace[k])
    again = CheckedSchedule(clip(RISE_AND_FALL), T)
    again.restore(json.loads(json.dumps(part.state())))
    for k in range(cut, len(trace)):
        bounds = again.bounds(k, trace[k])
        if not math.isnan(trace[k]):
            assert (bounds, str(again.metrics())) == expected[k]
    assert again.state() == whole.state()


def test_the_state_of_another_schedule_is_left_alone():
    schedule = TargetSchedule(clip("80%"), T)
    schedule.restore({"s": 1, "initial_entropy": 2.0})
    assert schedule.first is None


def follow(target, drift, reach, seed=0, noise=0.02):
    """Entropy of a made-up policy: falls by `drift` a step, moved by up to `reach` by lambda, and
    measured with `noise`, all relative.  Returns (distance from the curve, range of it, lambdas).
    """
    draw, schedule, entropy = random.Random(seed), TargetSchedule(clip(target), T), 1.3
    squares, wanted, lambdas = 0.0, [], []
    for k in range(T):
        schedule.bounds(k, entropy * (1 + noise * draw.gauss(0, 1)))
        squares += (entropy - schedule.metrics()["entropy_target"]) ** 2
        wanted.append(schedule.metrics()["entropy_target"])
        lambdas.append(schedule.metrics()["clip_lambda"])
        entropy *= math.exp(reach * lambdas[-1] - drift)
    return math.sqrt(squares / T), max(wanted) - min(wanted), lambdas


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(("drift", "reach"), [(0.005, 0.02), (0.008, 0.03), (-0.003, 0.03)])
def test_a_policy_follows_a_curve_that_is_within_reach(drift, reach, seed):
    distance, span, lambdas = follow(RISE_AND_FALL, drift, reach, seed)
    assert distance < 0.07 * span and min(lambdas) < 0 < max(lambdas)
    distance, span, _ = follow(RISE_AND_FALL, drift, reach, seed, noise=0.0)
    assert distance < 0.03 * span
    distance, span, _ = follow(RISE_AND_FALL, drift, 0.0, seed)  # nothing moves it
    assert distance > 0.2 * span


def test_lambda_leaves_its_limit_as_soon_as_entropy_is_back():
    """A curve out of reach for half of the run does not wind the integral up."""
    schedule = TargetSchedule(clip(1.0), T)
    for k in range(30):
        schedule.bounds(k, 0.5)
        assert schedule.clip_lambda == 1.0
    schedule.bounds(30, 1.1)
    assert schedule.clip_lambda < 0


@pytest.mark.parametrize(
    ("given", "kept"),
    [(1, 1.0), ("5e-1", 0.5), ("80 %", "80%"), ([[0, 1], [1, "50%"]], ((0.0, 1.0), (1.0, "50%")))],
)
def test_the_three_forms(given, kept):
    assert clip(given).target == kept


ABOVE_0 = "expected an entropy above 0, in nats (0.9) or as a share of the first step's (80%)"


@pytest.mark.parametrize(
    ("target", "says"),
    [
        *((one, ABOVE_0) for one in (-1, 0, math.nan, math.inf, True, "0%", "-5%", "nan%", "high")),
        *((one, ABOVE_0) for one in ("%", "1%%", "", {}, {"to": 1}, [[0, -1]], [[0, [1]]])),
        *((one, ABOVE_0) for one in ("٨٠%", "８０%", "0.٩", "1_0%", "0x8%", "1e999%", "infinity")),
        *((one, "% of the first step's entropy is out of") for one in ("1e9%", "1e308%", "0.01%")),
        *(([[0, "100%"], [1, one]], "out of all reach") for one in ("1001%", "1e-9%")),
        (80, "no vocabulary has 80 nats; did you mean 80%, a share"),
        ("1e9", "no vocabulary has 1e+09 nats"),
        (1e-9, "1e-09 nats are no entropy to steer to; give 0.0001 or more"),
        ([], "name at least one point"),
        ([0.5, 0.8], "expected points [share of the run, entropy]"),
        ([[0, 1, 2]], "expected points [share of the run, entropy]"),
        ([[0.5, 1], [0.2, 1]], "shares of the run must rise, but 0.2 follows 0.5"),
        ([[0, 1], [0, 2]], "shares of the run must rise, but 0 follows 0"),
        *(([[one, 1]], "a share of the run is a number from 0 to 1") for one in (-0.1, 1.1, "5%")),
        *(
            ([[one, 1]], "a share of the run is a number from 0 to 1")
            for one in (math.nan, True, "٠")
        ),
        (None, "schedule=target follows clip.target, which is not set"),
    ],
    ids=str,
)
def test_what_is_no_curve_is_refused(target, says):
    with pytest.raises(ValidationError) as error:
        clip(target)
    assert says in str(error.value)


def test_a_curve_above_what_a_vocabulary_has_is_refused():
    check_target(clip([[0, "900%"], [1, 2.4]]), vocab_size=12)
    check_target(ClipConfig(schedule="id", target=9.0), vocab_size=12)  # is not used
    for target in (2.5, [[0, 2.5], [1, "80%"]]):
        with pytest.raises(UserError, match="2.5 nats; a policy of 12 tokens has at most .* 2.485"):
            check_target(clip(target), vocab_size=12)


@pytest.mark.parametrize("key", ["hi_slope", "lo_slope"])
def test_a_threshold_that_lambda_may_open_is_checked_at_the_start(key):
    with pytest.raises(UserError, match="is no interval of positive ratios"):
        check_schedule(clip("100%", **{key: -2.0}), T)


def steps(reach: Reach, entropy: float, target: float, clip_lambda: float, count: int) -> list[str]:
    values = {"entropy": entropy, "entropy_target": target, "clip_lambda": clip_lambda}
    return [said for step in range(count) if (said := reach.step(step, values))]


def test_a_curve_out_of_reach_is_said_once_for_each_direction():
    reach = Reach()
    assert steps(reach, 0.5, 1.0, 1.0, PATIENCE - 1) == []
    assert steps(reach, 0.99, 1.0, 1.0, 1) == []  # near enough
    (said,) = steps(reach, 0.5, 1.0, 1.0, 3 * PATIENCE)
    assert "below its target (0.5 against 1 nats)" in said and "clip.hi_intercept" in said
    assert steps(reach, 0.5, 1.0, 0.9, PATIENCE) == []
    assert steps(reach, 0.5, 1.0, 1.0, PATIENCE) == []
    (said,) = steps(reach, 1.5, 1.0, -1.0, PATIENCE)
    assert "above its target (1.5 against 1 nats)" in said and "clip.lo_intercept" in said


@pytest.mark.parametrize("missing", [{}, {"entropy": 1.0}, {"clip_lambda": math.nan}])
def test_nothing_is_said_of_what_was_not_measured(missing):
    reach = Reach()
    assert [reach.step(step, missing) for step in range(10)] == [None] * 10
