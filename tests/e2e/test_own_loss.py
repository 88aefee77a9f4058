"""A loss from a folder of the user's and a reference model, through the command line."""

from __future__ import annotations

import shutil

import pytest
from commands import ROOT, command_line, metrics
from compare_runs import untimed

pytestmark = pytest.mark.timeout(900)  # the first test waits for the example's start


@pytest.mark.slow
def test_a_continued_run_has_the_same_loss_and_the_reference_it_began_with(arguments, tmp_path):
    shutil.copy(ROOT / "examples" / "extend" / "my_loss.py", tmp_path / "mine.py")
    first, again = tmp_path / "first", tmp_path / "again"
    given = ("train.steps=2", "checkpoint.every=1", "kl.coef=0.05", "optim.lr=1e-5")
    loss = f"train.loss={tmp_path}/mine.py:SoftLimit", "train.loss_arguments.limit=1.5"
    done = command_line(*arguments(first, *given, *loss))
    assert done.returncode == 0, done.stderr
    one, two = metrics(first)
    assert 0 < one["kl"] < two["kl"], "the policy leaves the reference"
    assert 0 < one["loss_weight"] < 1.5

    shutil.copytree(first, again)
    shutil.rmtree(again / "checkpoints" / "step_000002")
    done = command_line(*arguments(again, *given, *loss))
    assert done.returncode == 0, done.stderr
    assert untimed(again / "metrics.jsonl") == untimed(first / "metrics.jsonl")


def test_a_loss_that_cannot_work_is_refused_before_the_run(arguments, tmp_path):
    source = (ROOT / "examples" / "extend" / "my_loss.py").read_text()
    (tmp_path / "mine.py").write_text(source.replace(".sum()", ".mean()"))
    given = arguments(tmp_path / "run", f"train.loss={tmp_path}/mine.py:SoftLimit")
    done = command_line(*given, "--dry-run")
    assert done.returncode == 2 and not done.stdout
    assert done.stderr.startswith("megatron-gpc: train.loss: ") and "mine.py" in done.stderr
    assert "Traceback" not in done.stderr
