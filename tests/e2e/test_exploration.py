"""The example on which exploration pays: what it rewards, its prompts, and its comparison."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
from commands import ROOT, metrics

from megatron_gpc.config import parts

EXAMPLE = ROOT / "examples" / "exploration"


@pytest.mark.parametrize(
    ("text", "label", "reward"),
    [
        ("1000000000000004", [9, 4, 7], {"reward": 1.0, "easy": 1.0}),  # an odd sum
        ("1000000000000005", [9, 4, 7], {"reward": 0.0, "easy": 0.0}),
        ("9090909090000000", [9, 5, 7], {"reward": 1.0, "hard": 1.0}),  # five of them
        ("9090909000000000", [9, 5, 7], {"reward": 0.0, "hard": 0.0}),
        ("99999", [9, 5, 7], {"reward": 0.0, "hard": 0.0}),  # too short
        ("", [9, 4, 6], {"reward": 0.0, "easy": 0.0}),
    ],
)
def test_easy_prompts_ask_for_luck_and_hard_ones_for_what_is_rare(text, label, reward):
    unlocks = parts.find("data.verifier", f"{EXAMPLE}/reward.py:unlocks", {})
    assert unlocks(text, label) == reward


@pytest.mark.slow
def test_the_comparison_evaluates_hard_prompts_and_says_what_they_show(tmp_path):
    given = ["train.steps=2", "eval.samples=2", "rollout.prompts_per_step=8", "train.epochs=1"]
    start = tmp_path / "start"
    where = [f"model.hf={start}", f"data.prompts={start}/train.jsonl"]
    done = subprocess.run(
        [
            *(sys.executable, str(EXAMPLE / "compare.py"), "--arms", "static", "bonus"),
            *("--seeds", "0", "1", "--out", str(tmp_path / "runs"), *given, *where),
            f"eval.prompts={start}/heldout.jsonl",
        ],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    train, hard, easy = (
        [json.loads(line)["label"] for line in (start / name).read_text().splitlines()]
        for name in ("train.jsonl", "heldout.jsonl", "heldout_easy.jsonl")
    )
    assert (len(train), len(hard), len(easy)) == (800, 40, 40)
    assert all(label[1] >= 5 for label in hard) and all(label[1] < 5 for label in easy)
    assert not {tuple(label) for label in hard + easy} & {tuple(label) for label in train}
    lines = metrics(tmp_path / "runs" / "bonus-0")
    assert {"reward_easy", "reward_hard"} <= lines[0].keys()
    (before, after) = [
        json.loads(line)
        for line in (tmp_path / "runs" / "bonus-0" / "eval.jsonl").read_text().splitlines()
    ]
    assert before["eval_reward"] < 0.05  # the start seldom manages it
    assert 0.0 <= after["eval_solved"] <= after["eval_pass_at_2"]
    report = (tmp_path / "runs" / "report.md").read_text()
    assert report in done.stdout and "| entropy bonus 0.01 - static | 2 |" in report
