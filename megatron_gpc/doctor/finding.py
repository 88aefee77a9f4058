"""One thing that the doctor has looked at."""

from __future__ import annotations

import dataclasses
from typing import Literal

Status = Literal["ok", "note", "problem"]
"""`note`: nothing is wrong, but one should know."""


@dataclasses.dataclass(frozen=True)
class Finding:
    """What was found of one thing on one node.

    >>> Finding("file limit", "problem", "256 open files", "ulimit -n 65536")
    """

    check: str
    status: Status
    found: str
    advice: str = ""
    """What to do about it; of every problem."""
    same: bool = False
    """Whether all nodes must say the same."""
