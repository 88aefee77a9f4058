"""One run a folder: locks that tell whether a run lives, and which process that is.

The kernel holds them for as long as the process lives, however that ends; what the file says of the
process is for people.
"""

from __future__ import annotations

import fcntl
import json
import os
import socket
import time
from pathlib import Path
from typing import Any, TextIO

from megatron_gpc.errors import UserError
from megatron_gpc.run.files import open_regular

RUNNING = "lock"
"""Held by rank 0."""
PREPARING = "launch.lock"
"""Held by the process that prepared the folder: the launcher, or rank 0."""
MOST_BYTES = 2**16
"""Of what the file says; what has that name may be another's."""
TRIES, PAUSE_S = 5, 0.05
"""`holder` looks at a lock by taking it for a moment; a run that starts then tries again."""


def take(run_dir: Path, name: str = RUNNING) -> TextIO:
    """Keep the run's folder to this process until it ends, in whatever way.

    Raises:
        UserError: another run is using the folder; or the lock is a link, to what would be emptied.
    """
    path = run_dir / name
    if path.is_symlink():
        raise UserError(f"run_dir: {path} is a link, and a lock never is; remove it")
    file = path.open("a+")
    try:
        for left in reversed(range(TRIES)):
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if not left:
                    raise
                time.sleep(PAUSE_S)
    except BlockingIOError:
        said = _said(file)
        file.close()
        raise UserError(
            f"run_dir: {run_dir} is in use by a run that has not ended{said and f' ({said})'}; "
            "wait for it, or choose another run_dir"
        ) from None
    except OSError as error:
        file.close()
        raise UserError(
            f"run_dir: {run_dir}: files cannot be locked there ({error.strerror}); have the "
            "file system mounted with locks (Lustre: -o flock), or choose another run_dir"
        ) from None
    file.truncate(0)
    file.write(json.dumps({"host": socket.gethostname(), "pid": os.getpid(), "since": time.time()}))
    file.flush()
    return file


def last_start(run_dir: Path) -> float:
    """When a run last took the folder [s since 1970]; 0 if none did, or no lock says it."""
    return max(_holder(run_dir / name, "since", 0.0) for name in (RUNNING, PREPARING))


def life(run_dir: Path) -> str:
    """Whether a run is using the folder, as its locks say; in words."""
    running, preparing = _held(run_dir / RUNNING), _held(run_dir / PREPARING)
    if None in (running, preparing):
        return "whether it runs cannot be told: files cannot be locked here"
    for name, held in ((PREPARING, preparing), (RUNNING, running)):
        if held:
            with (run_dir / name).open() as file:
                who = _said(file)
            state = "it is running" if running else "it is starting, or ending"
            return state + (who and f": {who}")
    host = _holder(run_dir / RUNNING, "host", socket.gethostname())
    elsewhere = f"; it ran on {host}, and not every file system shows this host its locks"
    return "it is not running" + (elsewhere if host != socket.gethostname() else "")


def _holder(path: Path, name: str, default: Any) -> Any:
    """What the lock's file says of the process that took it last; the default if it does not."""
    try:
        with open_regular(path) as file:
            return type(default)(json.loads(file.read(MOST_BYTES))[name])
    except (OSError, ValueError, TypeError, KeyError):
        return default


def _held(path: Path) -> bool | None:
    """Whether a process holds the lock; None if that cannot be told."""
    try:
        with open_regular(path) as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except (BlockingIOError, FileNotFoundError) as error:
        return isinstance(error, BlockingIOError)
    except OSError:
        return None
    return False


def _said(file: TextIO) -> str:
    """`process 7 on node3, since 14:05:01`; empty if the lock does not say."""
    file.seek(0)
    try:
        content = json.loads(file.read(MOST_BYTES))
        since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(content["since"]))
        return f"process {content['pid']} on {content['host']}, since {since}"
    except (ValueError, TypeError, KeyError):
        return ""
