"""Curves out of characters, for a console."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

CURVE_WIDTH = 44
"""Characters of a curve beside words."""
EIGHTHS = " ▏▎▍▌▋▊▉█"
HEIGHTS = "▁▂▃▄▅▆▇█"
ASCII_HEIGHTS = "_.-:=+*#"


def bar(share: float, width: int, ascii_only: bool = False) -> str:
    """A bar of `share` times `width` characters, to an eighth of one; none for nan."""
    if not share > 0:
        return ""
    eighths = round(8 * width * min(share, 1.0))
    if ascii_only:
        return "#" * round(eighths / 8)
    return "█" * (eighths // 8) + EIGHTHS[eighths % 8].strip()


def curve(values: Sequence[float], width: int, ascii_only: bool = False) -> str:
    """The values from left to right, their range over eight heights: `▁▃▆█▇▅▂`.

    More values than `width` are averaged in groups of about equal size; nan is left out, and a
    group of nan alone is a blank.
    """
    heights = ASCII_HEIGHTS if ascii_only else HEIGHTS
    width = min(width, len(values))
    edges = [round(i * len(values) / width) for i in range(width + 1)] if width else []
    groups = [
        [v for v in values[left:right] if not math.isnan(v)]
        for left, right in itertools.pairwise(edges)
    ]
    means = [sum(group) / len(group) if group else math.nan for group in groups]
    known = [mean for mean in means if not math.isnan(mean)]
    low, span = min(known, default=0.0), max(known, default=0.0) - min(known, default=0.0)
    return "".join(
        " " if math.isnan(mean) else heights[round(7 * (mean - low) / span) if span else 3]
        for mean in means
    )
