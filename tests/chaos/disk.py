"""The disk is full, the folder cannot be written or is gone, a byte of a checkpoint is flipped."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from random import Random

from chaos.campaign import Fault, Outcome
from chaos.run import KEPT, Run
from megatron_gpc.mcore.checkpoint.folder import checkpoints, damaged, final_name, part_name

DISK_BYTES = 32 * 2**20
"""A run has 4 MB, and 8 more whenever it hands over weights for the first time."""
CHECKPOINT_BYTES = 400_000
"""Of less free space no checkpoint can be made [bytes] ..."""
WEIGHTS_BYTES = 130_000
"""... and of less than this no file for a hand-over [bytes]."""


class _Disk(Fault):
    """The run has a small disk of its own."""

    @contextmanager
    def around(self, folder: Path) -> Iterator[Sequence[str]]:
        with small_disk(folder) as mounted:
            assert mounted, "mounting a tmpfs is not allowed here; try as root"
            yield ()

    def _ends(self, run: Run, reason: str) -> bool:
        """Wait until it has; False if it had done all of its work before.

        Raises:
            AssertionError: it did not, or its last words are not the reason.
        """
        if (code := run.await_end()) == 0:
            return False
        assert code in (1, 2) and "Traceback" not in run.said(), run.end_of_log()
        assert reason in run.last_words(), run.end_of_log()
        return True


class FullDisk(_Disk):
    """At any time, or in the middle of a checkpoint.

    The main rank is stopped until the disk is full, lest it be past that moment.

    Args:
        asynchronous: whether checkpoints are written in the background.
    """

    most_free = CHECKPOINT_BYTES

    def __init__(self, asynchronous: bool):
        self.overrides = (f"checkpoint.asynchronous={str(asynchronous).lower()}",)
        self._asynchronous = asynchronous

    def hit(self, run: Run, draw: Random) -> Outcome | None:
        when, comes = self.moment(run, draw)
        if not run.wait_for(lambda: bool(comes())):
            return None
        began = time.monotonic()
        if not run.signal(lambda: run.rank(0), signal.SIGSTOP):
            return None
        with full_disk(run.folder, draw.randrange(self.most_free)):
            run.signal(lambda: run.rank(0), signal.SIGCONT)
            if not self._ends(run, "No space left on device"):
                return None
        took = time.monotonic() - began
        return Outcome(f"disk full {when}, for {_named(run)}", True, took)

    def moment(self, run: Run, draw: Random) -> tuple[str, Callable[[], object]]:
        """In words, and what is true once it has come."""
        aimed = ("while a checkpoint is written", lambda: _parts(run.folder))
        return draw.choice([("at any time", lambda: True), aimed])


class FullInTheEnd(FullDisk):
    """When the last checkpoint is begun (if that is in the background) or done, and weights are
    handed over for the last time."""

    most_free = WEIGHTS_BYTES
    picks_its_moment = True

    def moment(self, run: Run, draw: Random) -> tuple[str, Callable[[], object]]:
        last = final_name(run.folder, run.steps_asked)

        def hands_over_next() -> bool:
            if self._asynchronous:
                return part_name(last).exists()
            room = not _parts(run.folder) and len(checkpoints(run.folder)) == KEPT
            return last.exists() and room  # an older one was removed

        return "before the last hand-over", hands_over_next


class NoWriting(_Disk):
    """Nothing can be made in the run's folders any more."""

    def hit(self, run: Run, draw: Random) -> Outcome | None:
        began = time.monotonic()
        with _immutable(run.folder):
            if not self._ends(run, "Operation not permitted"):
                return None
        return Outcome("no writing", True, time.monotonic() - began)


class FolderIsGone(_Disk):
    """The run's folder is moved away, and back once the run has ended."""

    def hit(self, run: Run, draw: Random) -> Outcome | None:
        began = time.monotonic()
        away = run.folder.with_name("away")
        run.folder.rename(away)
        try:
            ended = self._ends(run, "No such file or directory")
        finally:
            shutil.rmtree(run.folder, ignore_errors=True)
            away.rename(run.folder)
        return Outcome("folder gone", True, time.monotonic() - began) if ended else None


class FlippedByte(_Disk):
    """In the newest checkpoint of a run that was killed: the next start takes the one before."""

    def hit(self, run: Run, draw: Random) -> Outcome | None:
        began = time.monotonic()
        if not run.wait_for(lambda: len(checkpoints(run.folder)) > 1):
            return None
        if not run.signal(run.launcher, signal.SIGKILL):
            return None
        run.await_end()
        newest = checkpoints(run.folder)[-1]
        file = draw.choice(sorted(newest.iterdir()))
        content = bytearray(file.read_bytes())
        content[draw.randrange(len(content))] ^= draw.randrange(1, 256)
        file.write_bytes(content)
        took = time.monotonic() - began
        run.start()
        if not run.wait_for(run.trains):
            return None
        (aside,) = damaged(run.folder)
        assert newest.name in aside.name and f"{newest} is damaged" in run.said()
        shutil.rmtree(aside)
        return Outcome("flipped byte", True, took)


def _named(run: Run) -> str:
    """What the last words say could not be written: sync, checkpoints, metrics.jsonl..."""
    said = re.search(rf"{re.escape(str(run.folder))}/([\w.]+)", run.last_words())
    return said[1] if said else "something"


def _parts(run_dir: Path) -> list[Path]:
    """Checkpoints that are being written."""
    return list((run_dir / "checkpoints").glob("step_*.part/*"))


@contextmanager
def small_disk(folder: Path) -> Iterator[bool]:
    """A disk of DISK_BYTES at `folder` during the block; False where mounting is not allowed."""
    folder.mkdir(exist_ok=True)
    mount = ["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "chaos", str(folder)]
    mounted = subprocess.run(mount, capture_output=True).returncode == 0
    try:
        yield mounted
    finally:
        if mounted:
            subprocess.run(["umount", "--lazy", str(folder)], check=True)


@contextmanager
def full_disk(run_dir: Path, free_bytes: int) -> Iterator[None]:
    """During the block, no more than `free_bytes` can be written where run_dir is."""
    ballast = run_dir.parent / "ballast"
    try:
        with ballast.open("wb") as file:
            filled = 0
            while (more := shutil.disk_usage(run_dir).free - free_bytes) > 0:
                with suppress(OSError):  # others write meanwhile
                    os.posix_fallocate(file.fileno(), filled, more)
                    filled += more
        yield
    finally:
        ballast.unlink()


@contextmanager
def _immutable(folder: Path) -> Iterator[None]:
    """During the block, no file can be made or removed in it, whoever asks."""
    folders = [path for path in (folder, *folder.iterdir()) if path.is_dir()]
    try:
        subprocess.run(["chattr", "+i", *folders], check=True)
        yield
    finally:
        subprocess.run(["chattr", "-i", *folders], check=True)
