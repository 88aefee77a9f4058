"""The main job's task: what it rewards, what its start draws, and the comparison of schedules."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from commands import ROOT, command_line, metrics
from compare_runs import untimed

from megatron_gpc.config import parts
from megatron_gpc.config.file import dump, load
from megatron_gpc.metrics.baseline import against, read_baseline
from megatron_gpc.metrics.runs import load_run

EXAMPLE = ROOT / "examples" / "entropy_control"
SCRIPT = str(EXAMPLE / "build.py")


@pytest.mark.parametrize(
    ("text", "reward"),
    [
        ("1000000000000004", 1.0),
        ("0000000000000004", 0.0),  # even
        ("4000000000000001", 0.0),  # ends in 1
        ("100000000000004", 0.0),  # 15 digits
        ("1000000000000004$", 0.0),
        ("", 0.0),
    ],
)
def test_a_right_answer_ends_as_asked_and_has_the_parity_asked_for(text, reward):
    fits = parts.find("data.verifier", f"{EXAMPLE}/reward.py:fits", {})
    assert fits(text, [4, 7]) == reward


def test_the_warm_up_teaches_what_its_docstring_says():
    distributions = parts.find("model.build", f"{SCRIPT}:distributions", {})
    chances = distributions(torch.tensor([[4, 7], [0, 0]]))
    assert chances.shape == (2, 16, 12) and bool((chances[..., 10:] == 0).all())
    assert torch.allclose(chances.sum(-1), torch.ones(2, 16))
    assert chances[0, 2].argmax() == 6 and chances[0, 2, 9] == pytest.approx(0.3 * chances[0, 2, 6])
    assert chances[0, 15, 4] > 0.5  # the ending is right half of the time besides
    plain = chances[0, :15]
    entropy = -(plain * plain.clamp(min=1e-30).log()).sum(-1)
    assert torch.allclose(entropy, entropy[0].expand(15))


def test_the_record_of_static_clipping_is_of_the_main_jobs_settings(tmp_path):
    steps = "".join(f'{{"step": {n}, "entropy": 0.9, "reward": 0.5}}\n' for n in range(1, 61))
    (tmp_path / "metrics.jsonl").write_text(steps)
    (tmp_path / "config.yaml").write_text(dump(load(EXAMPLE / "config.yaml")))
    assert against(load_run(tmp_path)).startswith("against static (")


@pytest.fixture
def start(tmp_path, monkeypatch) -> Path:
    """The example's start after two updates."""
    main = parts.find("model.build", f"{SCRIPT}:main", {})
    make_start = main.__globals__["make_start"]
    monkeypatch.setitem(make_start.__globals__, "UPDATES", 2)
    monkeypatch.setattr(sys, "argv", ["build.py", str(tmp_path / "start")])
    threads = torch.get_num_threads()
    main()
    torch.set_num_threads(threads)
    return tmp_path / "start"


@pytest.mark.parametrize("example", ["entropy_control", "exploration"])
def test_a_start_is_not_taught_if_it_cannot_be_written(example, tmp_path, monkeypatch, capsys):
    (tmp_path / "file").write_text("")
    monkeypatch.syspath_prepend(str(ROOT / "examples" / example))  # as where a script lies is
    main = parts.find("model.build", f"{ROOT}/examples/{example}/build.py:main", {})
    for out, said in (
        (tmp_path / "file", "file is not an empty folder"),
        (tmp_path / "file" / "start", "start: cannot be written: "),
        (None, "the following arguments are required: out"),
    ):
        monkeypatch.setattr(sys, "argv", ["build.py", *([str(out)] if out else [])])
        assert main() == 2
        line = capsys.readouterr().err
        assert said in line and line.count("\n") == 1


def test_prompts_are_the_hundred_and_ten_of_them_held_out(start):
    train, held_out = (
        {json.loads(line)["prompt"] for line in (start / name).read_text().splitlines()}
        for name in ("train.jsonl", "heldout.jsonl")
    )
    assert len(train) == 90 and len(held_out) == 10 and not train & held_out
    assert train | held_out == {f"{n:02}=" for n in range(100)}


def small(start: Path, *overrides: str) -> list[str]:
    return [
        *(f"model.hf={start}", f"data.prompts={start}/train.jsonl", "rollout.prompts_per_step=8"),
        *("train.mini_batches=2", "train.epochs=1", *overrides),
    ]


def test_a_steered_run_records_lambda_and_target_and_says_the_latter(start, tmp_path):
    given = ["eval.prompts=null", "plots=false", "parallel.tp=1", "parallel.pp=1", "train.steps=1"]
    steered = ["clip.schedule=target", "clip.target=90%", f"run_dir={tmp_path}/run"]
    done = command_line("train", str(EXAMPLE / "config.yaml"), *small(start, *given, *steered))
    assert done.returncode == 0, done.stderr
    (step,) = metrics(tmp_path / "run")
    assert step["entropy_target"] == pytest.approx(0.9 * step["entropy"])
    assert step["clip_lambda"] == -1.0 and step["eps_low_at_p0"] == pytest.approx(0.3)
    assert f"{step['entropy']:.3f} -> {step['entropy_target']:.3f}" in done.stdout


@pytest.mark.slow
def test_schedules_are_compared_and_one_that_steers_goes_on_bit_for_bit(start, tmp_path):
    given = [f"eval.prompts={start}/heldout.jsonl", "eval.samples=2", "checkpoint.every=2"]
    done = subprocess.run(
        [
            *(sys.executable, str(EXAMPLE / "compare.py"), "--arms", "static", "target"),
            *("--seeds", "0", "--out", str(tmp_path / "runs")),
            *small(start, "train.steps=4", "diagnostics.signal=2", *given),
        ],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "target - static" in done.stdout
    assert (tmp_path / "runs" / "comparison.png").stat().st_size > 50_000
    assert read_baseline(tmp_path / "runs" / "static.json").label == "static"
    static, target = (metrics(tmp_path / "runs" / f"{arm}-0") for arm in ("static", "target"))
    assert "clip_lambda" not in static[0] and len(static) == len(target) == 4
    assert target[0]["entropy_target"] == target[0]["entropy"] == static[0]["entropy"]
    assert target[2]["entropy_target"] == pytest.approx(1.10 * target[0]["entropy"])
    assert all(-1 <= step["clip_lambda"] <= 1 for step in target)
    assert ["signal_share" in step for step in target] == [True, False] * 2
    shares = [step["signal_share"] for step in target[::2]]  # null if no answer was right
    assert all(share is None or -1 <= share <= 1 for share in shares)

    again = tmp_path / "again"
    shutil.copytree(tmp_path / "runs" / "target-0", again)
    shutil.rmtree(again / "checkpoints" / "step_000004")
    continued = command_line("train", str(again / "config.yaml"), f"run_dir={again}")
    assert continued.returncode == 0, continued.stderr
    whole, other = (untimed(run / "metrics.jsonl") for run in (tmp_path / "runs/target-0", again))
    assert other == whole
