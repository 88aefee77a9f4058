"""Means over seeds, with 95 % intervals of Student's t."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

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
