"""Is the curve that entropy should follow within the thresholds' reach?"""

from __future__ import annotations

from collections.abc import Mapping

PATIENCE = 5
"""Steps in a row ..."""
APART = 0.05
"""... at which entropy is farther from its target than this share of it, at a limit of lambda."""


class Reach:
    """Looks at every step of a run; says once for each direction that the curve is out of reach."""

    def __init__(self) -> None:
        self._limit, self._steps = 0.0, 0
        self._said: set[float] = set()

    def step(self, step: int, values: Mapping[str, float]) -> str | None:
        """What is to be said after training step `step`, whose metrics are `values`."""
        limit = values.get("clip_lambda", 0.0)
        entropy, target = values.get("entropy", 0.0), values.get("entropy_target", 0.0)
        if abs(limit) < 1 or not (target - entropy) * limit > APART * target:
            limit = 0.0
        self._steps = self._steps + 1 if limit == self._limit else 1
        self._limit = limit
        if not limit or self._steps < PATIENCE or limit in self._said:
            return None
        self._said.add(limit)
        where, keys, other = ("below", "hi", "lower") if limit > 0 else ("above", "lo", "higher")
        return (
            f"step {step}: clip.target is out of reach: for {PATIENCE} steps entropy has been "
            f"{where} its target ({entropy:.3g} against {target:.3g} nats) with the threshold open "
            f"as far as it goes (clip_lambda {limit:g}); widen clip.{keys}_intercept and "
            f"clip.{keys}_slope, make more updates a rollout, or draw the curve {other}"
        )
