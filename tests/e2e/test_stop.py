"""Asking a run to end: it saves, and goes on as if nothing had been."""

from __future__ import annotations

import json
import re
import signal
import time
from pathlib import Path

import pytest
from commands import launch, metrics, pids_using, rank_process
from compare_runs import unequal_files, untimed

from megatron_gpc.mcore.checkpoint.folder import checkpoints
from megatron_gpc.run.stop import SAVED, marker

pytestmark = pytest.mark.timeout(900)  # the first test waits for the example's start
STEPS = 6


@pytest.fixture(scope="module")
def undisturbed(arguments, tmp_path_factory):
    run = tmp_path_factory.mktemp("stop") / "undisturbed"
    assert _to_the_end(_command(arguments, run)) == 0
    return run


@pytest.mark.slow
def test_a_run_that_was_asked_to_end_saves_and_continues_to_the_same_bytes(
    undisturbed, arguments, tmp_path
):
    run = tmp_path / "run"
    command = _command(arguments, run)
    process = launch(command)
    _await_step(run, 2)
    process.send_signal(signal.SIGUSR2)  # where is everybody?
    stacks = [run / "logs" / f"rank_{number}.stacks" for number in (0, 1)]
    deadline = time.monotonic() + 30
    while not all(file.exists() and "train.py" in file.read_text() for file in stacks):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    rank = rank_process(process.pid, 1)  # one hears of it, all save
    assert rank is not None
    rank.send_signal(signal.SIGUSR1)
    assert process.wait(120) == SAVED
    step = json.loads(marker(run).read_text())["step"]
    assert 2 <= step < STEPS and len(metrics(run)) == step
    assert [one.name for one in checkpoints(run)] == [f"step_{step:06d}"]
    assert not pids_using(run)
    assert _to_the_end(command) == 0
    assert not marker(run).exists()
    assert untimed(run / "metrics.jsonl") == untimed(undisturbed / "metrics.jsonl")
    assert not unequal_files(checkpoints(run)[-1], checkpoints(undisturbed)[-1])


def test_a_signal_before_there_are_ranks_waits_for_them(arguments, tmp_path):
    run = tmp_path / "run"
    process = launch(_command(arguments, run))
    status = Path(f"/proc/{process.pid}/status")
    while not _blocked(status.read_text()) & 1 << signal.SIGTERM - 1:
        assert process.poll() is None
    process.send_signal(signal.SIGUSR2)  # where is everybody?  Nowhere yet.
    process.send_signal(signal.SIGTERM)
    assert process.wait(120) == SAVED
    assert json.loads(marker(run).read_text()) == {"step": 0}
    assert not (run / "checkpoints").exists() and not pids_using(run)


def _blocked(status: str) -> int:
    return int(re.search(r"^SigBlk:\s*(\w+)", status, re.MULTILINE)[1], 16)


def _command(arguments, run):
    return arguments(run, "parallel.tp=2", f"train.steps={STEPS}", "checkpoint.every=0")


def _to_the_end(command) -> int:
    return launch(command).wait(200)


def _await_step(run, step: int) -> None:
    deadline = time.monotonic() + 120
    while not (run / "metrics.jsonl").exists() or len(metrics(run)) < step:
        assert time.monotonic() < deadline
        time.sleep(0.05)
