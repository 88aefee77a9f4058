"""Ending a run early, on request, so that the same command continues it.

SIGUSR1 (Slurm's --signal, ahead of a time limit or of preemption) and SIGTERM (scancel) ask for it.
All ranks agree at the end of a training step, save, and end with exit code `SAVED`.
"""

from __future__ import annotations

import json
import signal
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from megatron_gpc.run.files import replace_text

SAVED = 75
"""Exit code of a run that was asked to end and can be continued (EX_TEMPFAIL of sysexits.h)."""
STOP_SIGNALS = (signal.SIGUSR1, signal.SIGTERM)


@contextmanager
def held(signals: Iterable[signal.Signals]) -> Iterator[None]:
    """Keep signals back in this process, and in those it starts until `StopRequest` there.

    A rank takes seconds to import what it needs; a signal that comes meanwhile waits for it.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


class StopRequest:
    """From now on a stop signal ends nothing by itself; it is noted here.  In the main thread."""

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        for one in STOP_SIGNALS:
            signal.signal(one, self._note)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)

    def over(self) -> None:
        """The run has ended: signals that come while this process does so mean nothing any more."""
        for one in STOP_SIGNALS:
            signal.signal(one, signal.SIG_IGN)

    def _note(self, number: int, _: object) -> None:
        self.received = signal.Signals(number)


def marker(run_dir: Path) -> Path:
    """Exists while a run is one that was asked to end and did; holds {"step": its last}."""
    return run_dir / "stopped.json"


def mark(run_dir: Path, step: int) -> None:
    """Say, for whoever starts the run again, that everything up to `step` is saved."""
    replace_text(marker(run_dir), json.dumps({"step": step}) + "\n")
