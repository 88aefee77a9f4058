"""SIGKILL to a rank, to the launcher, to the rollout server."""

from __future__ import annotations

import signal
import time
from random import Random

from chaos.campaign import STEP_S, Fault, Outcome
from chaos.run import POLL_S, RANKS, Run


class KillRank(Fault):
    """The others end, and so does the launcher, which names the one that was killed."""

    while_it_starts = True

    def hit(self, run: Run, draw: Random) -> Outcome | None:
        number = draw.randrange(RANKS)
        began = time.monotonic()
        if not run.signal(lambda: run.rank(number), signal.SIGKILL):
            return None
        assert run.await_end() == 1, run.end_of_log()
        assert f"rank {number} failed first, ended by SIGKILL" in run.last_words(), run.end_of_log()
        return Outcome(f"rank {number}", True, time.monotonic() - began)


class KillLauncher(Fault):
    """Everything ends with it."""

    while_it_starts = True

    def hit(self, run: Run, draw: Random) -> Outcome | None:
        began = time.monotonic()
        if not run.signal(run.launcher, signal.SIGKILL):
            return None
        assert run.await_end() == -signal.SIGKILL, run.end_of_log()
        return Outcome("launcher", True, time.monotonic() - began)


class KillEngine(Fault):
    """The run starts another and goes on; every second time it dies while it gets new weights.

    Args:
        sync: how it gets them.
    """

    def __init__(self, sync: str):
        self.overrides = (f"rollout.server.sync={sync}",)
        self._sync = sync

    def hit(self, run: Run, draw: Random) -> Outcome | None:
        aimed = draw.random() < 0.5
        if aimed and not self._weights_come(run, draw):
            return None
        began, step = time.monotonic(), run.step()
        if not run.signal(run.engine, signal.SIGKILL):
            return None
        if not run.goes_on(step):
            return None
        when = "while weights come" if aimed else "at any time"
        return Outcome(f"engine ({self._sync}) {when}", False, time.monotonic() - began)

    def _weights_come(self, run: Run, draw: Random) -> bool:
        """Wait until the run hands weights over: of `disk` a file appears, the others follow the
        end of a step."""
        if self._sync == "disk":
            sync = run.folder / "sync"
            if not run.wait_for(lambda: bool([*sync.glob(".model.safetensors.*")])):
                return False
        elif not run.goes_on():
            return False
        time.sleep(draw.uniform(POLL_S, STEP_S / 4))
        return True
