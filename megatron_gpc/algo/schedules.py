"""How the clip thresholds move over training: static, ID, DID, OD (arXiv 2602.09782).

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

A schedule is asked once a training step and its answer holds for all updates of that step.  It
takes the globally reduced entropy, so every rank that asks gets the same answer.
"""

from __future__ import annotations

from typing import Any, Protocol

from megatron_gpc import parts
from megatron_gpc.algo.clipping import affine_bounds
from megatron_gpc.config import ClipConfig
from megatron_gpc.types import Bounds

Line = tuple[float, float]  # (slope, intercept) of a threshold over p


def _mix(weight: float, a: Line, b: Line) -> Line:
    """weight * a + (1 - weight) * b; exact at the ends, where a term with weight 0 must vanish."""
    if weight == 1.0:
        return a
    if weight == 0.0:
        return b
    return (weight * a[0] + (1.0 - weight) * b[0], weight * a[1] + (1.0 - weight) * b[1])


class Schedule(Protocol):
    """A clip schedule; `make_schedule` builds the configured one."""

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
        self.kind = clip.schedule
        self.boundary = clip.phase_split * steps
        self.steps = steps
        self.std_high: Line = (0.0, clip.eps_high)
        self.std_low: Line = (0.0, clip.eps_low)
        self.hi: Line = (clip.hi_slope, clip.hi_intercept)
        self.lo: Line = (clip.lo_slope, clip.lo_intercept)

    def phase_lambda(self, k: int) -> float:
        """lambda(k), each phase stretched to its own length."""
        if k <= self.boundary:
            return 1.0 - k / self.boundary
        return -(k - self.boundary) / (self.steps - self.boundary)

    def bounds(self, k: int, entropy: float) -> Bounds:
        lam = self.phase_lambda(k)
        first = k <= self.boundary
        if self.kind in ("static", "hi", "lo"):
            high = self.hi if self.kind == "hi" else self.std_high
            low = self.lo if self.kind == "lo" else self.std_low
        elif self.kind == "id":
            high = _mix(lam, self.hi, self.std_high) if first else self.std_high
            low = self.std_low if first else _mix(1.0 + lam, self.lo, self.std_low)
        else:
            high = _mix(lam, self.std_high, self.hi) if first else self.hi
            low = self.std_low if first else _mix(1.0 + lam, self.lo, self.std_low)
        return affine_bounds(high, low)

    def state(self) -> dict[str, Any]:
        return {}

    def restore(self, state: dict[str, Any]) -> None:
        assert not state, "only OD keeps state"


class OscillatorySchedule:
    """OD: a hysteresis controller on the measured entropy.

    tau_low = od_floor * H_init;  tau_high(k) = tau_low + (H_init - tau_low) (1 - k/T).  s becomes 1
    (raise entropy) at H <= tau_low, 0 (lower it) at H > tau_high(k), and stays otherwise.  H_init
    is the entropy of the first step.  Before the first crossing s = 0 (the paper does not say).
    """

    def __init__(self, clip: ClipConfig, steps: int):
        self.steps = steps
        self.floor = clip.od_floor
        self.raising = affine_bounds((clip.hi_slope, clip.hi_intercept), (0.0, clip.eps_low))
        self.lowering = affine_bounds((0.0, clip.eps_high), (clip.lo_slope, clip.lo_intercept))
        self.initial_entropy: float | None = None
        self.s = 0

    def bounds(self, k: int, entropy: float) -> Bounds:
        if self.initial_entropy is None:
            self.initial_entropy = entropy
        tau_low = self.floor * self.initial_entropy
        tau_high = tau_low + (self.initial_entropy - tau_low) * (1.0 - k / self.steps)
        if entropy <= tau_low:
            self.s = 1
        elif entropy > tau_high:
            self.s = 0
        return self.raising if self.s else self.lowering

    def state(self) -> dict[str, Any]:
        return {"s": self.s, "initial_entropy": self.initial_entropy}

    def restore(self, state: dict[str, Any]) -> None:
        self.s = state["s"]
        self.initial_entropy = state["initial_entropy"]


SCHEDULES = dict.fromkeys(("static", "hi", "lo", "id", "did"), PhaseSchedule) | {
    "od": OscillatorySchedule
}


def make_schedule(clip: ClipConfig, steps: int) -> Schedule:
    """The configured schedule over `steps` training steps: a built-in one or the user's own.

    Raises:
        UserError: it cannot be imported, or cannot be called with (clip, steps) and the arguments.
    """
    key, name, arguments = "clip.schedule", clip.schedule, clip.schedule_arguments
    make = parts.find(key, name, SCHEDULES)
    parts.check_call(key, name, make, ("clip", "steps"), arguments)
    return make(clip, steps, **arguments)
