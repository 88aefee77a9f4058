"""The example's starting point, and short runs from it."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from commands import CONFIG, command_line, metrics

ROUNDED = {"entropy": 1e-6, "loss": 1e-4, "grad_norm": 1e-4, "ratio_mean": 1e-5}
"""Largest relative differences of a first step at another layout.  Adam's first update is the
gradient's sign times the learning rate: a gradient within rounding of 0 moves its weight one way or
the other, so loss and gradient of the updates after it differ by more than rounding."""


@pytest.fixture(scope="session")
def arguments(warm_start) -> Callable[..., list[str]]:
    """arguments(run_dir, *overrides): of `megatron-gpc train` for a short run of the example."""

    def make(run_dir: Path, *overrides: str) -> list[str]:
        return [
            "train",
            str(CONFIG),
            f"run_dir={run_dir}",
            f"model.hf={warm_start}",
            f"data.prompts={warm_start}/train.jsonl",
            "eval.prompts=null",
            "plots=false",
            "parallel.tp=1",
            "parallel.pp=1",
            "rollout.prompts_per_step=8",
            "train.mini_batches=2",
            "train.epochs=2",
            "train.micro_batch_size=16",
            "optim.lr=1e-3",
            *overrides,
        ]

    return make


@pytest.fixture(scope="session")
def reference_run(arguments, tmp_path_factory) -> Path:
    """The folder of a run of one step and one process, with its plots; only to be read.

    Processes that share the tests share it.
    """
    base = tmp_path_factory.getbasetemp()
    folder = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    run, finished = folder / "reference", folder / "reference.finished"
    with (folder / "reference.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not finished.exists():
            done = command_line(*arguments(run, "train.steps=1", "plots=true"))
            assert done.returncode == 0, done.stderr
            finished.touch()
    return run


@pytest.fixture(scope="session")
def reference(reference_run) -> dict[str, Any]:
    """Metrics of the first step of one process."""
    return metrics(reference_run)[0]
