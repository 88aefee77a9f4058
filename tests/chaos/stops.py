"""SIGSTOP to a rank, to the launcher, to the rollout server: for a while, or for too long."""

from __future__ import annotations

import re
import signal
import time
from collections.abc import Callable
from random import Random

import psutil

from chaos.campaign import Fault, Outcome
from chaos.run import RANKS, Run

SHORT_S = 1.5
"""A stop that a run sits out [s]."""
SILENT_S = 12.0
"""Deadline of a silent rank in the runs whose ranks are stopped for too long [s]."""


class StopForAWhile(Fault):
    """A process is stopped and goes on; so does the run."""

    def hit(self, run: Run, draw: Random) -> Outcome | None:
        number = draw.randrange(RANKS)
        name, who = draw.choice(
            [
                (f"rank {number}", lambda: run.rank(number)),
                ("launcher", run.launcher),
                ("engine", run.engine),
            ]
        )
        began, step = time.monotonic(), run.step()
        if not _stop(run, who, draw.uniform(0.1, SHORT_S)) or not run.goes_on(step):
            return None
        return Outcome(f"{name} for a while", False, time.monotonic() - began)


class StopRankTooLong(Fault):
    """The others end the run when its deadline is over, and the launcher says where it stood."""

    deadlines = (f"guard.silent_minutes={SILENT_S / 60}",)

    def hit(self, run: Run, draw: Random) -> Outcome | None:
        number = draw.randrange(RANKS)
        began = time.monotonic()
        if not run.signal(lambda: run.rank(number), signal.SIGSTOP):
            return None
        assert run.await_end() == 1, run.end_of_log()
        said = run.last_words()
        assert f"rank {1 - number} ended the run: no sign of life" in said, run.end_of_log()
        assert re.search(rf"rank {number}: .*\(stopped\)", said), run.end_of_log()
        return Outcome(f"rank {number} too long", True, time.monotonic() - began)


class StopEngineTooLong(Fault):
    """The run takes it for dead, starts another in its place, and goes on."""

    overrides = ("rollout.server.request_timeout_s=2",)

    def hit(self, run: Run, draw: Random) -> Outcome | None:
        began, step = time.monotonic(), run.step()
        if not run.signal(run.engine, signal.SIGSTOP) or not run.goes_on(step):
            return None
        return Outcome("engine too long", False, time.monotonic() - began)


def _stop(run: Run, who: Callable[[], psutil.Process | None], seconds: float) -> bool:
    """False if there was nobody to be stopped any more."""
    stopped: list[psutil.Process] = []

    def noted() -> psutil.Process | None:
        stopped[:] = [process] if (process := who()) else []
        return stopped[0] if stopped else None

    if not run.signal(noted, signal.SIGSTOP):
        return False
    time.sleep(seconds)
    stopped[0].send_signal(signal.SIGCONT)
    return True
