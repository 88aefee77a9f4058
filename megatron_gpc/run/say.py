"""What the program says of itself, on standard error: one line, from one process of a run."""

from __future__ import annotations

import os
import stat
import sys
from contextlib import suppress


def say(text: str) -> None:
    """Print `megatron-gpc: TEXT`; every rank but rank 0 is silent."""
    if os.environ.get("RANK", "0") == "0":
        with suppress(OSError):  # the terminal may be gone
            print(f"megatron-gpc: {text}", file=sys.stderr, flush=True)


def unheard() -> None:
    """The terminal is gone, and writing to it fails: write nothing there from now on."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for number in (1, 2):
        if stat.S_ISCHR(os.fstat(number).st_mode):  # a terminal; it no longer says so itself
            os.dup2(nowhere, number)
    os.close(nowhere)
