"""The connection between trainer and engine is cut: for a while, or for too long."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from random import Random
from typing import get_args

from chaos.campaign import Fault, Outcome
from chaos.proxy import Cut, Proxy
from chaos.run import Run
from megatron_gpc.engines.process import EmbeddedServer

SHORT_S = 3.0
"""A cut that a run sits out [s]."""
PATIENCE_S = 4
"""rollout.server.start_timeout_s of runs that are cut off for too long [s]."""


class _Cut(Fault):
    """The engine is not the run's own and outlives it; the proxy stands before it."""

    request_timeout_s = 1
    rounded = ("logp_gap_mean", "logp_gap_max")
    """What the engine itself says of its tokens depends, by rounding, on which requests it happens
    to compute together, also without a fault; training takes the trainer's."""

    def __init__(self, task: Path):
        self._task = task

    @contextmanager
    def around(self, folder: Path) -> Iterator[Sequence[str]]:
        with (
            EmbeddedServer(self._task, folder / "server.log") as server,
            Proxy(int(server.url.rpartition(":")[2])) as self._proxy,
        ):
            yield (
                f"rollout.server.urls=http://127.0.0.1:{self._proxy.port}",
                f"rollout.server.request_timeout_s={self.request_timeout_s}",
            )


class CutForAWhile(_Cut):
    """The run asks again until it is answered."""

    def hit(self, run: Run, draw: Random) -> Outcome | None:
        how: Cut = draw.choice(get_args(Cut))
        began, step = time.monotonic(), run.step()
        self._proxy.cut(how)
        time.sleep(draw.uniform(0.05, SHORT_S))
        self._proxy.mend()
        if not run.goes_on(step):
            return None
        return Outcome(f"{how} for a while", False, time.monotonic() - began)


class CutTooLong(_Cut):
    """The run ends by itself and says which address does not answer."""

    deadlines = (f"rollout.server.start_timeout_s={PATIENCE_S}",)

    def hit(self, run: Run, draw: Random) -> Outcome | None:
        how: Cut = draw.choice(get_args(Cut))
        began = time.monotonic()
        self._proxy.cut(how)
        try:
            code = run.await_end()
        finally:
            self._proxy.mend()
        if code == 0:  # it had got its last samples before
            return None
        assert code == 1 and "Traceback" not in run.said(), run.end_of_log()
        assert f":{self._proxy.port}" in run.last_words(), run.end_of_log()
        return Outcome(f"{how} too long", True, time.monotonic() - began)
