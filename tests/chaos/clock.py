"""The clock of all processes of a run jumps, forwards and backwards, by seconds to days."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from random import Random

import warm

from chaos.campaign import Fault, Outcome
from chaos.run import Run

LIBRARY = Path("/usr/lib/x86_64-linux-gnu/faketime/libfaketimeMT.so.1")
"""Debian: apt install faketime."""
MOST_S = 48 * 3600.0
"""Of a jump [s]."""
LATE_S = 30.0
"""No run may wait for so long because of one [s]."""


class JumpClock(Fault):
    """The run goes on, and no wait ends early or late.

    libfaketime reads an offset from a file at every look at the wall clock; the monotonic clock, by
    which a kernel lets nobody jump, stays.
    """

    @contextmanager
    def around(self, folder: Path) -> Iterator[Sequence[str]]:
        if not LIBRARY.exists():
            raise AssertionError(f"{LIBRARY} is not there; apt install faketime")
        self._file = folder / "offset"
        self._file.write_text("+0")
        self.environment = {
            "LD_PRELOAD": str(LIBRARY),
            "FAKETIME_TIMESTAMP_FILE": str(self._file),
            "FAKETIME_NO_CACHE": "1",
            "FAKETIME_DONT_FAKE_MONOTONIC": "1",
        }
        with warm.cold():  # a fork keeps the libraries that it has
            yield ()

    def hit(self, run: Run, draw: Random) -> Outcome | None:
        offset = draw.choice((-1, 1)) * draw.uniform(1.0, MOST_S)
        began, step = time.monotonic(), run.step()
        part = self._file.with_suffix(".part")
        part.write_text(f"{offset:+.3f}")
        part.replace(self._file)
        if not run.wait_for(lambda: run.step() > step, LATE_S):
            return None
        return Outcome("jump", False, time.monotonic() - began)
