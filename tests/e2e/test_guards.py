"""Runs that end themselves: numbers that are not finite, a silent rank, a rank that dies."""

from __future__ import annotations

import re
import signal
import subprocess
import time

import pytest
import torch
from commands import ROOT, command_line, launch, metrics, pids_using, rank_process

from megatron_gpc.engines.process import EmbeddedServer
from megatron_gpc.run.launch import run_ranks, stacks_file
from megatron_gpc.run.placement import Share

pytestmark = pytest.mark.timeout(900)  # the first test waits for the example's start


def test_updates_that_are_not_finite_are_saved_and_too_many_end_the_run(arguments, tmp_path):
    """Weights grow by lr x weight_decay = 1e18: only the first update of the run can be made."""
    run = tmp_path / "run"
    overrides = ("train.steps=2", "guard.max_skipped_updates=2")
    overrides += ("optim.lr=1e9", "optim.weight_decay=1e9")
    done = command_line(*arguments(run, *overrides))
    names = [f"step_000001_update_{update}.pt" for update in (2, 3, 4)]
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "not finite in 3 updates (guard.max_skipped_updates=2)" in done.stderr
    assert all(str(run / "skipped" / name) in done.stdout + done.stderr for name in names)
    assert {file.name for file in (run / "skipped").iterdir()} == set(names)

    saved = torch.load(run / "skipped" / names[0])
    assert len(saved["samples"]) == len(saved["tokens"]) == 8 * 8 // 2
    for tokens, prompt, old_logp in zip(
        saved["tokens"], saved["prompt_lengths_N"], saved["old_logp"], strict=True
    ):
        assert len(tokens) == prompt + len(old_logp)
    assert saved["bounds"]["upper_intercept"] == 1.5
    assert metrics(run) == [] and pids_using(run) == []


@pytest.fixture
def server(warm_start, tmp_path):
    """Up before the run, so that the run's own start is short."""
    with EmbeddedServer(warm_start, tmp_path / "server.log") as server:
        yield server.url


@pytest.mark.slow
def test_a_silent_run_ends_with_the_stacks_of_every_rank(arguments, server, tmp_path):
    run = tmp_path / "run"
    overrides = (
        *("train.steps=1000", "parallel.dp=2", "guard.silent_minutes=0.15"),
        f"rollout.server.urls={server}",
    )
    with launch(
        arguments(run, *overrides),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    ) as running:
        try:
            deadline = time.monotonic() + 100
            while not (run / "metrics.jsonl").exists() or not metrics(run):
                assert time.monotonic() < deadline and running.poll() is None
                time.sleep(0.05)
            rank_process(running.pid, 1).send_signal(signal.SIGSTOP)
            stopped_at = time.monotonic()
            _, said = running.communicate(timeout=60)
        finally:
            running.kill()
    assert running.returncode == 1
    assert 8 < time.monotonic() - stopped_at < 30
    assert metrics(run)[0]["skipped_updates"] == 0
    assert re.search(r"rank 0 ended the run: no sign of life", said)
    assert re.search(r"rank 1: .+:\d+ in \w+ \(stopped\)", said)
    for rank in (0, 1):
        assert "train.py" in stacks_file(run / "logs", rank).read_text()
    assert pids_using(run) == []


@pytest.mark.parametrize(
    ("how", "rank", "code", "says"),
    [
        ("raises", 2, 1, "ValueError: rank 2 cannot go on"),
        ("killed", 1, 1, "rank 1 failed first, ended by SIGKILL"),
    ],
)
def test_the_rank_that_failed_first_has_the_last_word(
    monkeypatch, capfd, tmp_path, how, rank, code, says
):
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}:{ROOT / 'tests' / 'e2e'}")
    assert run_ranks([how, str(rank)], Share.alone(3), tmp_path, module="failing_ranks") == code
    said = capfd.readouterr().err
    last = said[said.rindex("megatron-gpc: ") :]  # before it may stand what rank 0 said, a victim
    assert f"rank {rank} failed first" in last and says in last and "remote worker" not in last
