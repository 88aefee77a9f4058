"""How the clip thresholds move over training: static, ID, DID, OD (arXiv 2602.09782).

`target`, which follows a curve, is in target.py.

k is the number of finished training steps (0 at the first), T their total, s the phase split, and
lambda falls from 1 to 0 over phase 1 (k <= sT) and from 0 to -1 over phase 2.  At s = 0.5 this is
the paper's lambda(k) = 1 - 2k/T.

    schedule  phase    eps_plus                              eps_minus
    static             eps_high                              eps_low
    Hi                 Hi(p)                                 eps_low
    Lo                 eps_high                              Lo(p)
    ID        1        lambda Hi(p) + (1 - lambda) eps_high  eps_low
              2        eps_high                              (1 + lambda) Lo(p) - lambda eps_low
    DID       1        lambda eps_high + (1 - lambda) Hi(p)  eps_low
              2        Hi(p)                                 (1 + lambda) Lo(p) - lambda eps_low
    OD        s_k = 1  Hi(p)                                 eps_low
              s_k = 0  eps_high                              Lo(p)

A schedule is asked once a training step, on one rank, and its answer holds on all ranks for all
updates of that step.  It is given the mean entropy over the tokens of all ranks.  A step that has
nothing to train on does not ask it, but counts in k.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch

from megatron_gpc.algo.clipping import opened_bounds
from megatron_gpc.algo.target import TargetSchedule
from megatron_gpc.config import ClipConfig, parts
from megatron_gpc.errors import PartError, UserError
from megatron_gpc.types import LARGEST, Bounds, is_usable

SCHEDULE_KEY = "clip.schedule"


class Schedule(Protocol):
    """A clip schedule: what a class or a factory gives that is called with (clip, steps).

    `clip` is the configuration's section, `steps` T.  Also called with clip.schedule_arguments, by
    keyword.  A method metrics(), which gives numbers by name, is optional: they are logged with the
    step whose bounds were asked for last.
    """

    def bounds(self, k: int, entropy: float) -> Bounds:
        """Thresholds of the training step that follows k finished ones.

        Args:
            k: finished training steps, 0 <= k <= T.
            entropy: mean entropy of the policy at the start of the step [nats], reduced over all
                ranks.
        """
        ...

    def state(self) -> dict[str, Any]:
        """What a restart needs (JSON values)."""
        ...

    def restore(self, state: dict[str, Any]) -> None:
        """Take over what `state` gave."""
        ...


class PhaseSchedule:
    """static, Hi, Lo, ID and DID: functions of the step alone."""

    def __init__(self, clip: ClipConfig, steps: int):
        self.clip, self.steps = clip, steps
        self.boundary = clip.phase_split * steps

    def phase_lambda(self, k: int) -> float:
        """lambda(k), each phase stretched to its own length."""
        if k <= self.boundary:
            return 1.0 - k / self.boundary
        return -(k - self.boundary) / (self.steps - self.boundary)

    def bounds(self, k: int, entropy: float) -> Bounds:
        lam = self.phase_lambda(k)
        first, second = (lam, 0.0) if k <= self.boundary else (0.0, 1.0 + lam)
        hi, lo = {
            "static": (0.0, 0.0),
            "hi": (1.0, 0.0),
            "lo": (0.0, 1.0),
            "id": (first, second),
            "did": (1.0 - first, second),
        }[self.clip.schedule]
        return opened_bounds(self.clip, hi, lo)

    def state(self) -> dict[str, Any]:
        return {}

    def restore(self, state: dict[str, Any]) -> None:
        """Ignored: the state is that of another schedule, which the run had before."""


class OscillatorySchedule:
    """OD: a hysteresis controller on the measured entropy.

    tau_low = od_floor * H_init;  tau_high(k) = tau_low + (H_init - tau_low) (1 - k/T).  s becomes 1
    (raise entropy) at H <= tau_low, 0 (lower it) at H > tau_high(k), and stays otherwise.  H_init
    is the entropy of the first step.  Before the first crossing s = 0 (the paper does not say).
    """

    def __init__(self, clip: ClipConfig, steps: int):
        self.steps = steps
        self.floor = clip.od_floor
        self.raising, self.lowering = opened_bounds(clip, hi=1.0), opened_bounds(clip, lo=1.0)
        self.initial_entropy: float | None = None
        self.s = 0

    def bounds(self, k: int, entropy: float) -> Bounds:
        if math.isfinite(entropy):  # what was not measured moves nothing
            self._measure(k, entropy)
        return self.raising if self.s else self.lowering

    def _measure(self, k: int, entropy: float) -> None:
        if self.initial_entropy is None:
            self.initial_entropy = entropy
        tau_low = self.floor * self.initial_entropy
        tau_high = tau_low + (self.initial_entropy - tau_low) * (1.0 - k / self.steps)
        if entropy <= tau_low:
            self.s = 1
        elif entropy > tau_high:
            self.s = 0

    def state(self) -> dict[str, Any]:
        return {"s": self.s, "initial_entropy": self.initial_entropy}

    def restore(self, state: dict[str, Any]) -> None:
        if state.keys() == self.state().keys():  # else another schedule's: begin anew
            self.s = state["s"]
            self.initial_entropy = state["initial_entropy"]


SCHEDULES = dict.fromkeys(("static", "hi", "lo", "id", "did"), PhaseSchedule) | {
    "od": OscillatorySchedule,
    "target": TargetSchedule,
}


class CheckedSchedule:
    """The configured schedule, built in or the user's own; what it gives is checked.

    One rank has it, and the others take its answers: a user's schedule may draw random numbers.

    Args:
        state: of an earlier one, where the run goes on; empty: from the start.

    Raises:
        UserError: it cannot be imported, or called with (clip, steps) and the arguments.
        PartError: (also from every method) it fails, or gives what cannot be used.
    """

    def __init__(self, clip: ClipConfig, steps: int, state: Mapping[str, Any] | None = None):
        self.name = clip.schedule
        make = parts.find(SCHEDULE_KEY, self.name, SCHEDULES)
        parts.check_call(SCHEDULE_KEY, self.name, make, ("clip", "steps"), clip.schedule_arguments)
        with self._blamed("its start"):
            self._schedule: Schedule = make(clip, steps, **clip.schedule_arguments)
        methods = {"bounds": ("k", "entropy"), "state": ()}
        parts.check_methods(SCHEDULE_KEY, self.name, self._schedule, methods)
        if isinstance(self._schedule, TargetSchedule):  # both ends hold for all between them
            for clip_lambda in (-1.0, 1.0):
                self._check(self._schedule.mixed(clip_lambda), f"clip_lambda {clip_lambda:g}")
        self._asked = True
        if state:
            self.restore(dict(state))

    def thresholds(self, k: int, entropy_T: torch.Tensor) -> Bounds:
        """Those of the training step that follows k finished ones.

        A step without tokens has no entropy and no use for thresholds, so they are NaN and the
        schedule is not asked: whatever it remembers is of what was measured.

        Args:
            entropy_T: the policy's at every response token, before the step's updates [nats].
        """
        self._asked = len(entropy_T) > 0
        if not self._asked:
            return Bounds(*(math.nan,) * 4)
        return self.bounds(k, float(entropy_T.double().mean()))

    def bounds(self, k: int, entropy: float) -> Bounds:
        doing = f"bounds(k={k}, entropy={entropy:g})"
        with self._blamed(doing):
            found = self._schedule.bounds(k, entropy)
        self._check(found, doing)
        return found

    def metrics(self) -> dict[str, float]:
        """What the schedule says of the step whose thresholds were asked for last; nothing of a
        step without tokens."""
        if not self._asked:
            return {}
        with self._blamed("metrics()"):
            found = getattr(self._schedule, "metrics", dict)()
        try:
            named = {name: float(value) for name, value in dict(found).items()}
        except (TypeError, ValueError, OverflowError):
            named = {"": math.nan}
        if all(isinstance(name, str) and name not in ("", "step") for name in named):
            return named
        raise PartError(
            f"{SCHEDULE_KEY}: {self.name}: metrics() gave {found!r}; expected numbers by name, and "
            "no name `step`"
        )

    def state(self) -> dict[str, Any]:
        """As it reads when it comes back from a checkpoint."""
        with self._blamed("state()"):
            state = self._schedule.state()
        try:
            plain = json.loads(json.dumps(state, allow_nan=False))
        except (TypeError, ValueError) as error:
            plain = error
        if not isinstance(plain, dict):
            raise PartError(
                f"{SCHEDULE_KEY}: {self.name}: state() gave {state!r}; expected a dictionary, "
                "of what JSON can hold"
            )
        return plain

    def restore(self, state: dict[str, Any]) -> None:
        mine = self.name in SCHEDULES and state.keys() == self._schedule.state().keys()
        if mine and not all(one is None or is_usable(one) for one in state.values()):
            raise UserError(
                f"{SCHEDULE_KEY}: the checkpoint's state of {self.name} is {state!r:.200}, not "
                "numbers; go back to the checkpoint before it"
            )
        with self._blamed(f"restore({state})"):
            self._schedule.restore(state)

    def _check(self, found: Any, doing: str) -> None:
        problem = _problem(found)
        if problem:
            raise PartError(f"{SCHEDULE_KEY}: {self.name}: {doing} gave {found}: {problem}")

    def _blamed(self, doing: str) -> AbstractContextManager[None]:
        return parts.blamed(SCHEDULE_KEY, self.name, doing)


def check_schedule(clip: ClipConfig, steps: int) -> None:
    """Try the configured schedule out: made-up entropies, and what a restart would do.

    Raises:
        UserError: what is wrong with it.
    """
    try:
        first, second = CheckedSchedule(clip, steps), CheckedSchedule(clip, steps)
        for k in sorted({0, steps // 2, steps - 1}):
            first.bounds(k, 1.0 / (1 + k))
            first.metrics()
        state = first.state()
        if state:  # as train.py does
            second.restore(state)
        if second.state() != state:
            raise UserError(
                f"{SCHEDULE_KEY}: {clip.schedule}: after restore({state}) its state() is "
                f"{second.state()}; a run that is continued would go on otherwise"
            )
    except PartError as error:
        raise UserError(str(error)) from error


def _problem(bounds: Any) -> str | None:
    """Why these are no thresholds to train with; None if they are."""
    if not isinstance(bounds, Bounds):
        return "expected megatron_gpc.types.Bounds"
    numbers = dataclasses.astuple(bounds)
    if not all(map(is_usable, numbers)):
        return f"expected four numbers from {-LARGEST:g} to {LARGEST:g}"
    for p in (0.0, 1.0):
        upper, lower = 1.0 + bounds.eps_high_at(p), 1.0 - bounds.eps_low_at(p)
        if upper <= 0 or lower >= upper:
            return f"[{lower:g}, {upper:g}] at p = {p:g} is no interval of positive ratios"
    return None
