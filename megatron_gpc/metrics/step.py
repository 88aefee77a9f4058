"""What a training step says of itself besides its updates: batch, thresholds, time."""

from __future__ import annotations

import math
import time
from collections.abc import Callable

import torch

from megatron_gpc.algo.regions import region_masks
from megatron_gpc.types import Bounds, RolloutBatch, TokenStats


def step_metrics(
    batch: RolloutBatch, scored: TokenStats, weights_T: torch.Tensor, bounds: Bounds, clock: Clock
) -> dict[str, float]:
    """What a step says of itself besides its updates; means over all response tokens, nan where
    there are none.

    Computed from globally reduced values, so every rank gets the same numbers.
    """
    advantages_T = batch.advantages_N.repeat_interleave(batch.response_lengths_N)
    regions = region_masks(scored.logp_T, scored.entropy_T, advantages_T)
    gap_T = (scored.logp_T - batch.rollout_logp_T).abs().double()
    at = {"p0": 0.0, "p05": 0.5, "p1": 1.0}
    return {
        "entropy": float(scored.entropy_T.double().mean()),
        "response_length": float(batch.response_lengths_N.double().mean()),
        "logp_gap_mean": float(gap_T.mean()),
        "logp_gap_max": float(gap_T.max()) if len(gap_T) else math.nan,
        "correction_mean": float(weights_T.double().mean()),
        **{f"share_e{i}": float(mask.double().mean()) for i, mask in enumerate(regions, start=1)},
        **{f"eps_high_at_{name}": bounds.eps_high_at(p) for name, p in at.items()},
        **{f"eps_low_at_{name}": bounds.eps_low_at(p) for name, p in at.items()},
        **clock.metrics(batch.num_response_tokens),
    }


class Clock:
    """Seconds of each part of a training step.

    Args:
        on_lap: called at the end of each part, and at the beginning.
    """

    def __init__(self, on_lap: Callable[[], None]) -> None:
        on_lap()
        self.on_lap = on_lap
        self.last = time.perf_counter()
        self.laps: dict[str, float] = {}

    def lap(self, name: str) -> None:
        now = time.perf_counter()
        self.laps[name] = now - self.last
        self.last = now
        self.on_lap()

    def metrics(self, tokens: int) -> dict[str, float]:
        """The laps, and response tokens per second of the step, evaluation left out."""
        seconds = sum(self.laps.values()) - self.laps["seconds_evaluation"]
        return {**self.laps, "tokens_per_second": tokens / seconds}
