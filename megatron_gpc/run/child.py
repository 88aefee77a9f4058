"""Processes that this one starts, and that end with it in whatever way it ends."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext, suppress
from functools import partial
from pathlib import Path

import megatron_gpc

KILL_TIMEOUT_S = 60.0
"""How long a busy machine may take to be rid of a process that was killed [s]."""
LOG_LINES = 20
"""Of the end of a log, in an error about who wrote it."""


def die_with(parent: int) -> None:
    """Called in a child before it runs: it is killed when its parent ends in any way, or has.

    Args:
        parent: its pid, as the parent itself knows it.
    """
    pr_set_pdeathsig = 1
    ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)
    if os.getppid() != parent:  # it ended before the line above
        os.kill(os.getpid(), signal.SIGKILL)


def own_search_path() -> str:
    """PYTHONPATH for a child that is to run this copy of the package, wherever it is started from.

    Such a child is started with `python -P -m`: `-m` alone would look in the current folder first,
    and one of the package's name may lie there.
    """
    root = str(Path(megatron_gpc.__file__).parent.parent)
    return os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))


class Child:
    """A process that also ends when the thread that started it ends, in whatever way (the kernel
    sees to that), so start it from a thread that lives long enough.

    Args:
        command: what to run.
        environment: all of its environment; None: this process's.
        log: file that its output is appended to; None: it writes where this process does.
        session: it leads a session of its own: a terminal's Ctrl-C is not for it, and `end` also
            ends what it has started.
        begin: is called in it, with this process's pid, before its program.
        pass_fds: file descriptors that it inherits.
    """

    def __init__(
        self,
        command: Sequence[str],
        environment: Mapping[str, str] | None = None,
        log: Path | None = None,
        *,
        session: bool = False,
        begin: Callable[[int], object] = die_with,
        pass_fds: Sequence[int] = (),
    ):
        self.log, self._session = log, session
        with log.open("ab") if log else nullcontext() as output:
            self._log_begin = output.tell() if output else 0  # before it stand others' words
            self.process = subprocess.Popen(
                command,
                env=environment,
                stdin=subprocess.DEVNULL if log else None,
                stdout=output,
                stderr=output,
                preexec_fn=partial(begin, os.getpid()),
                start_new_session=session,
                pass_fds=pass_fds,
            )

    def alive(self) -> bool:
        return self.process.poll() is None

    def last_words(self) -> str:
        """The last LOG_LINES lines that it has logged; empty if it has no log (any more)."""
        if self.log is None:
            return ""
        try:
            with self.log.open("rb") as log:
                log.seek(self._log_begin)
                return "\n".join(log.read().decode(errors="replace").splitlines()[-LOG_LINES:])
        except OSError:
            return ""

    def end(self, asked: signal.Signals = signal.SIGKILL, patience_s: float = 0.0) -> None:
        """Ask it to end by a signal, and kill it if it has not ended in time; does nothing the
        second time."""
        if self.alive():
            self.process.send_signal(asked)
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(patience_s)
        if self._session:
            with suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
        self.process.kill()
        self.process.wait(KILL_TIMEOUT_S)
