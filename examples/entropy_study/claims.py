"""The paper's claims as numbers of runs, and what the numbers say of them.

A claim is one number a seed, taken from that seed's runs alone, so that what a seed decides
(prompts, first samples) cancels in differences.  Its mean over seeds has a 95 % interval of
Student's t; the claim is held to the sign it predicts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from megatron_gpc.metrics.runs import Run, correlation

Seed = Mapping[str, Run]
"""Arm -> run, of one seed."""

T_975 = (  # two-sided 95 % quantiles of Student's t for 1, 2, ... degrees of freedom
    *(12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228),
    *(2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086),
    *(2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042),
)


@dataclass(frozen=True)
class Interval:
    """Mean over seeds and half the width of its 95 % interval (nan for a single seed)."""

    mean: float
    half: float
    seeds: int

    def __str__(self) -> str:
        half = f" ± {self.half:.3f}" if math.isfinite(self.half) else ""
        return f"{self.mean:.3f}{half}" if math.isfinite(self.mean) else "-"


def interval(values: Sequence[float]) -> Interval:
    """Of one value a seed; values that are not known are left out."""
    known = np.array([v for v in values if math.isfinite(v)])
    if len(known) < 2:
        return Interval(float(known[0]) if len(known) else math.nan, math.nan, len(known))
    quantile = T_975[min(len(known) - 1, len(T_975)) - 1]
    half = quantile * known.std(ddof=1) / math.sqrt(len(known))
    return Interval(float(known.mean()), float(half), len(known))


# --- numbers of one run -----------------------------------------------------------------------


def entropy_change(run: Run) -> float:
    """End minus start; each is the mean of 5 % of the steps."""
    entropy = run.series("entropy")
    return entropy.last() - entropy.first()


def entropy_at(run: Run, share: float) -> float:
    """The smoothed entropy after a share of the run."""
    smooth = run.series("entropy").smooth()
    return float(smooth.values[round(share * (len(smooth) - 1))])


def mean_entropy(run: Run, begin: float = 0.0, end: float = 1.0) -> float:
    """Over the steps between two shares of the run."""
    values = run.series("entropy").values
    return float(np.nanmean(values[round(begin * len(values)) : round(end * len(values))]))


def at_end(run: Run, metric: str) -> float:
    """The last evaluation's; nan if it was not made."""
    values = run.series(metric).values
    return float(values[-1]) if len(values) else math.nan


def switches(run: Run) -> int:
    """How often OD's controller changed sides."""
    above = run.series("eps_high_at_p0").values
    return int((np.abs(np.diff(above)) > 1e-9).sum())


def fit(run: Run, predicted: str) -> float:
    """Pearson's r of a prediction and the measured change of entropy, over steps."""
    return correlation(run.series(predicted), run.series("dh_measured"))


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


def _change(arm: str, text: str, sign: int) -> Claim:
    return Claim("a", text, (arm,), lambda s: entropy_change(s[arm]), sign)


def _less(
    part: str, text: str, arm: str, other: str, number: Callable[[Run], float], sign: int = 1
) -> Claim:
    """number(arm) - number(other)."""
    return Claim(part, text, (arm, other), lambda s: number(s[arm]) - number(s[other]), sign)


def _move(arm: str, text: str, begin: float, end: float, sign: int) -> Claim:
    def value(s: Seed) -> float:
        return entropy_at(s[arm], end) - entropy_at(s[arm], begin)

    return Claim("c", text, (arm,), value, sign)


def _oscillates(arm: str, text: str) -> Claim:
    return Claim("c", text, (arm,), lambda s: switches(s[arm]) - 1, +1)


def _held_out(run: Run) -> float:
    return at_end(run, "eval_reward")


CLAIMS = (
    _change("e1", "E1 alone (likely, A > 0) lowers entropy", -1),
    _change("e2", "E2 alone (unlikely, A > 0) raises entropy", +1),
    _change("e3", "E3 alone (likely, A < 0) raises entropy", +1),
    _change("e4", "E4 alone (unlikely, A < 0) lowers entropy", -1),
    _less("b", "Hi(p) holds more entropy than static 0.2", "hi", "static", mean_entropy),
    _less("b", "Lo(p) holds less entropy than static 0.2", "lo", "static", mean_entropy, -1),
    _less("b", "Hi(p) holds more entropy than clip-higher", "hi", "clip-higher", mean_entropy),
    _less("b", "Hi(p) ends with a higher held-out reward than static", "hi", "static", _held_out),
    _move("id", "ID: entropy rises over phase 1", 0.0, 0.5, +1),
    _move("id", "ID: entropy falls over phase 2", 0.5, 1.0, -1),
    _less(
        *("c", "ID: more entropy than static in phase 1", "id", "static"),
        lambda run: mean_entropy(run, 0.0, 0.5),
    ),
    _move("did", "DID: entropy falls over the first quarter", 0.0, 0.25, -1),
    _move("did", "DID: entropy rises over the second quarter", 0.25, 0.5, +1),
    _move("did", "DID: entropy falls over phase 2", 0.5, 1.0, -1),
    _oscillates("od", "OD: the controller switches more than once"),
    _oscillates("od-0.5", "OD with a floor of 0.5: the controller switches more than once"),
    *(
        _less(
            "d",
            f"A phase split of 0.5 ends with a higher held-out reward than {split}",
            "id",
            f"id-{split}",
            _held_out,
        )
        for split in ("0.3", "0.4", "0.6")
    ),
    *(
        _less("e", f"ID ends with a higher held-out reward than {title}", "id", other, _held_out)
        for other, title in (
            ("static", "static"),
            ("clip-higher", "clip-higher"),
            ("did", "DID"),
            ("od", "OD"),
        )
    ),
    *(
        _less(
            "e",
            f"ID ends with a higher {name} than static",
            "id",
            "static",
            lambda run, metric=metric: at_end(run, metric),
        )
        for metric, name in (
            ("eval_distinct_right", "number of distinct right answers"),
            ("eval_pass_at_64", "pass@64"),
        )
    ),
    *(
        Claim(
            "f",
            f"The {name} goes with the measured change of entropy (static; r > 0)",
            ("static",),
            lambda s, metric=metric: fit(s["static"], metric),
            +1,
        )
        for metric, name in (
            ("dh_predicted", "logit-space prediction"),
            ("dh_directional", "directional derivative along the update"),
        )
    ),
    Claim(
        "f",
        "The directional derivative predicts better than the logit-space sum (difference of r)",
        ("static",),
        lambda s: fit(s["static"], "dh_directional") - fit(s["static"], "dh_predicted"),
        +1,
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
    """Every claim whose runs are there."""
    return [
        Verdict(claim, interval([claim.value(seed) for seed in seeds]))
        for claim in CLAIMS
        if all(arm in seed for seed in seeds for arm in claim.arms)
    ]
