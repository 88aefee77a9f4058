"""What the program says of itself, on standard error: one line, from one process of a run."""

from __future__ import annotations

import os
import sys
from contextlib import suppress


def say(text: str) -> None:
    """Print `megatron-gpc: TEXT`; every rank but rank 0 is silent."""
    if os.environ.get("RANK", "0") == "0":
        with suppress(OSError):  # the terminal may be gone
            print(f"megatron-gpc: {text}", file=sys.stderr, flush=True)
