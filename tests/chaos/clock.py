"""The clock of all processes of a run jumps, forwards and backwards, by seconds to days."""

from __future__ import annotations

import shutil
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from random import Random

import warm

from chaos.campaign import Fault, Outcome
from chaos.run import Run

SOURCE = Path(__file__).with_name("clock.c")
COMPILER = shutil.which("cc")
MOST_S = 48 * 3600
"""Of a jump [s]."""
LATE_S = 60.0
"""No run may wait for so long because of one [s]."""


class JumpClock(Fault):
    """The run goes on, and no wait ends early or late.  The monotonic clock stays, as it does when
    an administrator sets the other."""

    @contextmanager
    def around(self, folder: Path) -> Iterator[Sequence[str]]:
        assert COMPILER, "there is no C compiler: apt install gcc libc6-dev"
        library, self._file = folder / "clock.so", folder / "offset"
        subprocess.run([COMPILER, "-shared", "-fPIC", "-o", library, SOURCE], check=True)
        self._file.write_text("0")
        self.environment = {"LD_PRELOAD": str(library), "CLOCK_OFFSET_FILE": str(self._file)}
        with warm.cold():  # a fork keeps the libraries that it has
            yield ()

    def hit(self, run: Run, draw: Random) -> Outcome | None:
        offset_s = draw.choice((-1, 1)) * draw.randint(1, MOST_S)
        began, step = time.monotonic(), run.step()
        part = self._file.with_suffix(".part")
        part.write_text(str(offset_s))
        part.replace(self._file)
        if not run.wait_for(lambda: run.step() > step, LATE_S):
            return None
        return Outcome("jump", False, time.monotonic() - began)
