"""Ends a rank that is silent, and writes down why one fails."""

from __future__ import annotations

import faulthandler
import os
import signal
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from torch.distributed.elastic.multiprocessing.errors import ErrorHandler, record

from megatron_gpc.config import Config
from megatron_gpc.run.launch import STACKS_SIGNAL, stacks_file


def recorded(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function; if it raises, the traceback goes to the file that the launcher has named.

    torchrun and `launch.run_ranks` name one for every rank and show that of the first to fail.
    """
    return record(function, _ErrorHandler())


class _ErrorHandler(ErrorHandler):
    def record_exception(self, e: BaseException) -> None:
        with suppress(OSError):  # if the disk is full, the error itself is still raised
            super().record_exception(e)


class Watchdog:
    """Ends this process if it shows no sign of life during a `with` block.

    The timer is a C thread's: it needs neither Python's main thread nor its lock, so that it works
    if a collective or a file system hangs.  The stacks of all threads are written to
    `launch.stacks_file` first.  The launcher may ask for them too, see `launch.STACKS_SIGNAL`.
    """

    def __init__(self, config: Config):
        self._seconds = 60.0 * config.guard.silent_minutes
        self._file = stacks_file(config.run_dir / "logs", int(os.environ["RANK"]))

    def __enter__(self) -> Watchdog:
        self._file.parent.mkdir(exist_ok=True)
        self._stacks = self._file.open("w")
        signal.signal(STACKS_SIGNAL, signal.SIG_IGN)  # what it does again after the block
        faulthandler.register(STACKS_SIGNAL, file=self._stacks, all_threads=True)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {STACKS_SIGNAL})  # ranks start with it blocked
        self.alive()
        return self

    def __exit__(self, *_: object) -> None:
        faulthandler.cancel_dump_traceback_later()
        faulthandler.unregister(STACKS_SIGNAL)
        with suppress(OSError):  # of a disk that failed before: that error is the one to be seen
            self._stacks.close()
            if self._file.stat().st_size == 0:
                self._file.unlink()

    def alive(self) -> None:
        """A part of a training step has ended: start the time of silence again."""
        if self._seconds > 0:
            faulthandler.dump_traceback_later(self._seconds, exit=True, file=self._stacks)
