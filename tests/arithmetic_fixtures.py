"""The example's starting point, built once a session."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from commands import CONFIG, ROOT, command_line, metrics


@pytest.fixture(scope="session")
def start(tmp_path_factory) -> Path:
    """examples/arithmetic/build.py's output: checkpoint, tokenizer, prompts."""
    folder = tmp_path_factory.mktemp("arithmetic") / "start"
    environment = {k: v for k, v in os.environ.items() if k != "OMP_NUM_THREADS"}
    subprocess.run(
        [sys.executable, ROOT / "examples" / "arithmetic" / "build.py", folder],
        check=True,
        env=environment,
        timeout=840,
    )
    return folder


@pytest.fixture(scope="session")
def arguments(start) -> Callable[..., list[str]]:
    """arguments(run_dir, *overrides): of `megatron-gpc train` for a short run of the example."""

    def make(run_dir: Path, *overrides: str) -> list[str]:
        return [
            "train",
            str(CONFIG),
            f"run_dir={run_dir}",
            f"model.hf={start}",
            f"data.prompts={start}/train.jsonl",
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
    """The folder of a run of one step and one process, with its plots."""
    run = tmp_path_factory.mktemp("reference") / "run"
    done = command_line(*arguments(run, "train.steps=1", "plots=true"))
    assert done.returncode == 0, done.stderr
    return run


@pytest.fixture(scope="session")
def reference(reference_run) -> dict[str, Any]:
    """Metrics of the first step of one process."""
    return metrics(reference_run)[0]
