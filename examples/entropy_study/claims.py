"""The paper's claims as numbers of runs, and what the numbers say of them.

A claim is one number a seed, taken from that seed's runs alone.  Its mean over seeds has a 95 %
interval; the claim is held to the sign it predicts.  Arms are those of study.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from findings import STATIC, Number, Seed, mean_entropy

from megatron_gpc.metrics.intervals import Interval, interval
from megatron_gpc.metrics.runs import Run, correlation

Window = tuple[float, float]
"""Two shares of a run."""
START: Window = (0.0, 1 / 60)
DID_LOW: Window = (6 / 60, 10 / 60)
PEAK: Window = (16 / 60, 24 / 60)
MIDDLE: Window = (26 / 60, 30 / 60)
END: Window = (56 / 60, 1.0)
"""Of 60 steps: the first, 7-10, 17-24, 27-30, 57-60."""
FRESH_SEEDS = range(10, 15)
"""None of them was used for choosing the task, its settings or the windows."""
GOAL_R = 0.9


# --- numbers of one run -----------------------------------------------------------------------


def entropy_change(run: Run) -> float:
    """End minus start; each is the mean of 5 % of the steps."""
    entropy = run.series("entropy")
    return entropy.last() - entropy.first()


def moved(run: Run, begin: Window, end: Window) -> float:
    """Mean entropy in one window of the run minus that in an earlier one."""
    return mean_entropy(run, *end) - mean_entropy(run, *begin)


def switches(run: Run) -> int:
    """How often OD's controller changed sides."""
    above = run.series("eps_high_at_p0").values
    return int((np.abs(np.diff(above)) > 1e-9).sum())


def fit(run: Run, predicted: str) -> float:
    """Pearson's r of a prediction and the measured change of entropy, over steps."""
    return correlation(run.series(predicted), run.series("dh_measured"))


def drift(run: Run) -> float:
    """Slope of entropy over steps, by least squares, for each update of a step [nats]."""
    entropy = run.series("entropy").known()
    updates = run.config["train.mini_batches"] * run.config["train.epochs"]
    return float(np.polyfit(entropy.steps, entropy.values, 1)[0]) / updates


# --- claims -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Claim:
    part: str
    text: str
    arms: tuple[str, ...]
    """Runs that it needs."""
    value: Callable[[Seed], float]
    sign: int
    """+1: the number should be above 0; -1: below."""


def _of(part: str, text: str, arm: str, number: Number, sign: int = 1) -> Claim:
    return Claim(part, text, (arm,), lambda s: number(s[arm]), sign)


def _less(part: str, text: str, arm: str, other: str, number: Number, sign: int = 1) -> Claim:
    """number(arm) - number(other)."""
    return Claim(part, text, (arm, other), lambda s: number(s[arm]) - number(s[other]), sign)


def _move(arm: str, text: str, begin: Window, end: Window, sign: int) -> Claim:
    return _of("c", text, arm, lambda run: moved(run, begin, end), sign)


def _r(text: str, number: Number) -> Claim:
    return _of("d", text, STATIC, number)


CLAIMS = (
    _of("a", "E1 alone (likely, A > 0) lowers entropy", "e1", entropy_change, -1),
    _of("a", "E2 alone (unlikely, A > 0) raises entropy", "e2", entropy_change),
    _of("a", "E3 alone (likely, A < 0) raises entropy", "e3", entropy_change),
    _of("a", "E4 alone (unlikely, A < 0) lowers entropy", "e4", entropy_change, -1),
    _less("b", "Hi(p) holds more entropy than static 0.2", "hi", STATIC, mean_entropy),
    _less("b", "Lo(p) holds less entropy than static 0.2", "lo", STATIC, mean_entropy, -1),
    _less("b", "Hi(p) holds more entropy than clip-higher", "hi", "clip-higher", mean_entropy),
    _of("b", "Hi(p) alone raises entropy", "hi", lambda run: moved(run, START, END)),
    _of("b", "Lo(p) alone lowers entropy", "lo", lambda run: moved(run, START, END), -1),
    _move("id", "ID: entropy rises to its peak (steps 17-24 of 60)", START, PEAK, +1),
    _move("id", "ID: entropy is above its start at the end of phase 1", START, MIDDLE, +1),
    _move("id", "ID: entropy falls over phase 2", MIDDLE, END, -1),
    _less("c", "ID holds more entropy than static", "id", STATIC, mean_entropy),
    _move("did", "DID: entropy falls at first", START, DID_LOW, -1),
    _move("did", "DID: entropy rises until the end of phase 1", DID_LOW, MIDDLE, +1),
    _move("did", "DID: entropy falls over phase 2", MIDDLE, END, -1),
    _of("c", "OD: the controller switches more than once", "od", lambda run: switches(run) - 1),
    _r(
        "The logit-space prediction goes with the change of entropy",
        lambda r: fit(r, "dh_predicted"),
    ),
    _r("So does the derivative along the update", lambda r: fit(r, "dh_directional")),
    _r(
        "The derivative along the update predicts better than the logit-space sum",
        lambda r: fit(r, "dh_directional") - fit(r, "dh_predicted"),
    ),
    _r(
        "With the second-order term it predicts better still",
        lambda r: fit(r, "dh_second_order") - fit(r, "dh_directional"),
    ),
    _r(
        f"With the second-order term r exceeds {GOAL_R} (found: by how much)",
        lambda r: fit(r, "dh_second_order") - GOAL_R,
    ),
    _of(
        *("d", f"On the sums, too, it exceeds {GOAL_R}", "sums-0-static"),
        lambda run: fit(run, "dh_second_order") - GOAL_R,
    ),
    Claim(
        "e",
        "Sums: with coins for rewards Hi(p) and Lo(p) are further apart than without noise",
        ("sums-1-hi", "sums-1-lo", "sums-0-hi", "sums-0-lo"),
        lambda s: (
            (mean_entropy(s["sums-1-hi"]) - mean_entropy(s["sums-1-lo"]))
            - (mean_entropy(s["sums-0-hi"]) - mean_entropy(s["sums-0-lo"]))
        ),
        +1,
    ),
    _of(
        *("e", "Sums with coins for rewards: under ID entropy rises over phase 1", "sums-1-id"),
        lambda run: moved(run, START, MIDDLE),
    ),
    _of("f", "A coin for a reward: static clipping lowers entropy", "coin-static", drift, -1),
    _less(
        *("f", "A coin for a reward: Hi(p) drifts above static", "coin-hi", "coin-static"), drift
    ),
    _less(
        *("f", "A coin for a reward: Lo(p) drifts below static", "coin-lo", "coin-static"),
        *(drift, -1),
    ),
)


@dataclass(frozen=True)
class Verdict:
    claim: Claim
    found: Interval

    @property
    def word(self) -> str:
        """`reproduced` and `opposite` where the interval leaves out 0, `not shown` where it does
        not.  A single seed has a sign and no interval."""
        if not math.isfinite(self.found.mean):
            return "not measured"
        agrees = self.found.mean * self.claim.sign > 0
        if self.found.seeds < 2:
            return "sign agrees (one seed)" if agrees else "sign differs (one seed)"
        if abs(self.found.mean) <= self.found.half:
            return "not shown"
        return "reproduced" if agrees else "opposite"

    @property
    def holds(self) -> bool:
        return self.word in ("reproduced", "sign agrees (one seed)")


def judge(seeds: Sequence[Seed]) -> list[Verdict]:
    """Every claim, of the seeds that have its runs; `not measured` where none has."""
    return [
        Verdict(
            claim,
            interval([claim.value(s) for s in seeds if all(arm in s for arm in claim.arms)]),
        )
        for claim in CLAIMS
    ]
