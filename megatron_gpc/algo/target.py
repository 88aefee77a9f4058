"""Entropy along a curve that the user draws: `clip.schedule: target`.

lambda in [-1, 1] says which threshold is moved off its standard value, and how far:

    lambda > 0   eps_plus =  lambda Hi(p) + (1 - lambda) eps_high    eps_minus = eps_low
    lambda < 0   eps_minus = -lambda Lo(p) + (1 + lambda) eps_low    eps_plus = eps_high

Once a step a PI controller chooses it from the relative error e = 1 - H / target, where H is the
entropy measured before the step's updates and the target is that of the step's end:

    lambda = gain e + I, cut to [-1, 1]        I grows by integral_gain e a step

I stands still while lambda is cut (anti-windup): so |I| <= 1, and lambda leaves its limit as soon
as entropy is back.  Because errors are relative, the same gains suit a policy of 0.3 nats and one
of 3.
"""

from __future__ import annotations

import itertools
import math
from typing import Any

from megatron_gpc.algo.clipping import opened_bounds
from megatron_gpc.config import ClipConfig
from megatron_gpc.config.types import EntropyTarget
from megatron_gpc.errors import UserError
from megatron_gpc.types import Bounds


def target_at(target: EntropyTarget, done: float, first: float) -> float:
    """The curve's height [nats].

    Args:
        target: as the configuration has it.
        done: share of the run, 0 to 1.
        first: entropy of the first step [nats], which shares are of.
    """
    if not isinstance(target, tuple):
        return _nats(target, first)
    points = [(share, _nats(value, first)) for share, value in target]
    for (left, low), (right, high) in itertools.pairwise(points):
        if left <= done <= right:
            return low + (high - low) * (done - left) / (right - left)
    return points[0][1] if done < points[0][0] else points[-1][1]


def _nats(value: float | str, first: float) -> float:
    return first * float(value.removesuffix("%")) / 100 if isinstance(value, str) else value


def check_target(clip: ClipConfig, vocab_size: int) -> None:
    """Refuse a curve that no policy of so many tokens can follow.

    Raises:
        UserError: clip.target goes above ln V.
    """
    points = clip.target if isinstance(clip.target, tuple) else ((0.0, clip.target),)
    highest = max((nats for _, nats in points if isinstance(nats, float)), default=0.0)
    if clip.schedule == "target" and highest > math.log(vocab_size):
        raise UserError(
            f"clip.target: {highest:g} nats; a policy of {vocab_size} tokens has at most their "
            f"logarithm, {math.log(vocab_size):.4g}"
        )


class TargetSchedule:
    """A PI controller of entropy; see the top of this file.

    Entropy that was not measured moves nothing.
    """

    def __init__(self, clip: ClipConfig, steps: int):
        assert clip.target is not None  # ClipConfig sees to it
        self.clip, self.steps, self.target = clip, steps, clip.target
        self.first: float | None = None
        self.integral = 0.0
        self.clip_lambda = 0.0
        self.wanted = math.nan

    def bounds(self, k: int, entropy: float) -> Bounds:
        if math.isfinite(entropy):
            self._steer(k, entropy)
        return self.mixed(self.clip_lambda)

    def mixed(self, clip_lambda: float) -> Bounds:
        """The thresholds that belong to a lambda."""
        return opened_bounds(self.clip, hi=max(clip_lambda, 0.0), lo=max(-clip_lambda, 0.0))

    def _steer(self, k: int, entropy: float) -> None:
        if self.first is None:
            self.first = entropy
        self.wanted = target_at(self.target, k / self.steps, self.first)
        aim = target_at(self.target, (k + 1) / self.steps, self.first)
        error = 1.0 - entropy / aim if aim > 0 else 0.0  # a share of a first entropy of 0 is 0
        step = self.clip.target_integral_gain * error
        wish = self.clip.target_gain * error + self.integral + step
        self.clip_lambda = max(-1.0, min(1.0, wish))
        if wish == self.clip_lambda:
            self.integral += step

    def metrics(self) -> dict[str, float]:
        """lambda of the step, and the target of the entropy that was measured before it [nats]."""
        return {"clip_lambda": self.clip_lambda, "entropy_target": self.wanted}

    def state(self) -> dict[str, Any]:
        return {"first": self.first, "integral": self.integral, "clip_lambda": self.clip_lambda}

    def restore(self, state: dict[str, Any]) -> None:
        if state.keys() == self.state().keys():  # else another schedule's: begin anew
            self.first = state["first"]
            self.integral, self.clip_lambda = state["integral"], state["clip_lambda"]
