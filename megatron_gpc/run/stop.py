"""Ending a run early, on request, so that the same command continues it.

SIGUSR1 (Slurm's --signal, ahead of a time limit or of preemption), SIGTERM (scancel), SIGINT
(Ctrl-C) and SIGHUP (the terminal was closed; under nohup it is ignored) ask for it.  All ranks
agree before a training step, save, and end with exit code `SAVED`.  A second Ctrl-C ends everything
at once.
"""

from __future__ import annotations

import json
import os
import signal
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from megatron_gpc.run.files import replace_text
from megatron_gpc.run.say import say, unheard

SAVED = 75
"""Exit code of a run that was asked to end and can be continued (EX_TEMPFAIL of sysexits.h)."""
INTERRUPTED = 130
"""Exit code if Ctrl-C ended the run and nothing was saved; shells use the same."""
_HANGUP = () if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN else (signal.SIGHUP,)
BATCH_SIGNALS = (signal.SIGUSR1, signal.SIGTERM, *_HANGUP)
"""From the batch system, or from a terminal that was closed."""
STOP_SIGNALS = (*BATCH_SIGNALS, signal.SIGINT)
leave = os._exit
"""Ends this process at once; a part of the user's may not (config/parts.py)."""
AT_ONCE = "interrupted: ended at once; what no checkpoint holds is lost"


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
    """From now on a stop signal ends nothing by itself; it is noted here.  Made in the main thread.

    The second Ctrl-C ends this process at once.  A rank of `launch.run_ranks` leaves that to its
    launcher: a terminal sends SIGINT to both, and the launcher passes it on.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self.doing = "the run is still starting, and stops before its next step"
        """What the next request will lead to; the message says it when a request comes."""
        # `run_ranks` holds SIGINT back while it starts ranks; nobody else does.
        self._launched = signal.SIGINT in signal.pthread_sigmask(signal.SIG_BLOCK, ())
        # Blocked here, and so in whatever is started from here: a terminal and srun send SIGINT to
        # servers and workers too.  The listening thread takes it.
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        reader, writer = os.pipe()
        os.set_blocking(writer, False)
        # Written to when the signal comes, even while this thread waits inside a collective.
        signal.set_wakeup_fd(writer)
        for one in STOP_SIGNALS:
            signal.signal(one, self._note)
        threading.Thread(target=self._listen, args=(reader,), name="stop", daemon=True).start()
        signal.pthread_sigmask(signal.SIG_UNBLOCK, BATCH_SIGNALS)

    def over(self) -> None:
        """The run is over: ignore signals that come while this process ends."""
        for one in STOP_SIGNALS:
            signal.signal(one, signal.SIG_IGN)

    def _note(self, number: int, _: object) -> None:
        self.received = self.received or signal.Signals(number)

    def _listen(self, reader: int) -> None:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
        heard: set[int] = set()
        while number := os.read(reader, 1)[0]:
            if number not in STOP_SIGNALS:
                continue
            self.received = self.received or signal.Signals(number)
            if number == signal.SIGHUP:
                unheard()
            interrupt = number == signal.SIGINT
            if number not in heard and (interrupt or not heard):
                say(self._answer(interrupt))
            elif interrupt and not self._launched:
                say(AT_ONCE)
                leave(INTERRUPTED)  # the kernel ends what this process has started
            heard.add(number)

    def _answer(self, interrupt: bool) -> str:
        return f"asked to end: {self.doing}" + ("; Ctrl-C again ends at once" if interrupt else "")


def marker(run_dir: Path) -> Path:
    """This file exists after a run was asked to end and did; it holds {"step": its last}."""
    return run_dir / "stopped.json"


def mark(run_dir: Path, step: int) -> None:
    """Write down, for whoever continues the run, that everything up to `step` is saved."""
    replace_text(marker(run_dir), json.dumps({"step": step}) + "\n")
