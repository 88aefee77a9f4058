"""`a+b$` with a + b = N: the example task, where many answers are right."""

from __future__ import annotations

import re

_SUM = re.compile(r"([1-9][0-9]*)\+([1-9][0-9]*)\$")


def verify(text: str, label: int) -> float:
    """1 for two positive numbers without leading zeros that add up to `label`, else 0.

    >>> verify("120+380$", 500)
    1.0
    >>> verify("0120+380$", 500)
    0.0
    """
    match = _SUM.fullmatch(text)
    return float(match is not None and int(match[1]) + int(match[2]) == label)
