"""Runs of a whole training that a measurement looks at."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from megatron_gpc.config.file import load
from megatron_gpc.errors import RunStopped
from megatron_gpc.metrics.jsonl import read_metrics

TIMEOUT_S = 1200


def train(config: Path, *overrides: str) -> list[dict[str, float]]:
    """Train without a console; the run's metrics, one entry a step.

    Raises:
        UserError: an override cannot be used.
        RunStopped: the run failed, and has said why.
    """
    run_dir = load(config, overrides).run_dir
    command = [sys.executable, "-m", "megatron_gpc", "train", str(config), *overrides]
    done = subprocess.run(command, stdout=subprocess.DEVNULL, timeout=TIMEOUT_S)
    if done.returncode:
        raise RunStopped(f"the run that was to be measured failed (exit code {done.returncode})")
    return read_metrics(run_dir)
