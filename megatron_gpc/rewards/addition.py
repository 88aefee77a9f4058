"""`a+b$` with a + b = N: the example task, where many answers are right."""

from __future__ import annotations

import re
from collections.abc import Sequence

_SUM = re.compile(r"([1-9][0-9]{,18})\+([1-9][0-9]{,18})\$")
"""Of numbers that can add up to a label; Python refuses to read those of 4301 digits."""


def check_label(label: object) -> None:
    """Raises a ValueError for what is no sum of two positive numbers."""
    if type(label) is not int or not 2 <= label < 10**18:
        raise ValueError("expected a whole number, 2 or more")


def verify(text: str, label: int) -> float:
    """1 for two positive numbers without leading zeros that add up to `label`, else 0.

    >>> verify("120+380$", 500)
    1.0
    >>> verify("0120+380$", 500)
    0.0
    """
    match = _SUM.fullmatch(text)
    return float(match is not None and int(match[1]) + int(match[2]) == label)


def verify_all(pairs: Sequence[tuple[str, int]]) -> list[float]:
    """`verify` of each (text, label)."""
    return [verify(text, label) for text, label in pairs]
