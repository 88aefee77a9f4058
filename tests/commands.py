"""The command line as users run it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).parents[1]
COMMAND = (sys.executable, "-m", "megatron_gpc")
CONFIG = ROOT / "examples" / "arithmetic" / "config.yaml"


def command_line(
    *arguments: str, timeout: float = 200, **options: Any
) -> subprocess.CompletedProcess[str]:
    """Run `megatron-gpc ARGUMENTS` to its end."""
    return subprocess.run(
        [*COMMAND, *arguments],
        capture_output=True,
        text=True,
        timeout=timeout,
        cwd=ROOT,
        **options,
    )


def launch(arguments: Sequence[str], **options: Any) -> subprocess.Popen:
    """Start `megatron-gpc ARGUMENTS`."""
    return subprocess.Popen([*COMMAND, *arguments], cwd=ROOT, **options)


def metrics(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def pids_using(run_dir: Path) -> list[int]:
    """Processes of a run: they name its folder, or have its lock or logs open."""
    found = []
    for pid in map(int, filter(str.isdigit, os.listdir("/proc"))):
        try:
            named = str(run_dir).encode() in Path(f"/proc/{pid}/cmdline").read_bytes()
            opened = [os.readlink(fd) for fd in Path(f"/proc/{pid}/fd").iterdir()]
        except OSError:
            continue  # it ended while we looked
        if pid != os.getpid() and (named or any(f.startswith(str(run_dir)) for f in opened)):
            found.append(pid)
    return found


def rank_process(launcher: int, rank: int) -> psutil.Process | None:
    """A rank that the launcher of that pid has started; None where there is none (yet)."""
    for process in psutil.Process(launcher).children():
        try:
            if process.environ().get("RANK") == str(rank):
                return process
        except psutil.NoSuchProcess:
            continue  # it ended while we looked
    return None
