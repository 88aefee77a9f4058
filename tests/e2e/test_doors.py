"""A run whose reward, schedule and sink are files of a folder outside the checkout."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest
from commands import ROOT, metrics

from megatron_gpc.run.child import own_search_path

pytestmark = pytest.mark.timeout(900)  # the first test waits for the example's start

REWARD = """
import parity
def reward(text, label, prompt, bonus):
    if text == parity.FAIL:
        raise ValueError("as asked")
    right = parity.even(text) and prompt.text.endswith("=")
    return {"reward": right + bonus, "right": right, "length": len(text)}
"""
PARITY = """
FAIL = None
def even(text): return len(text) % 2 == 0
"""
SCHEDULE = """
import random
from megatron_gpc.algo.clipping import affine_bounds
class Random:
    def __init__(self, clip, steps): self.asked = 0
    def bounds(self, k, entropy):
        self.asked += 1
        eps = random.SystemRandom().uniform(0.1, 0.3)
        return affine_bounds((0.0, eps), (0.0, eps))
    def state(self): return {"asked": self.asked}
    def restore(self, state): self.asked = state["asked"]
"""
SINK = """
class Sink:
    def __init__(self, run_dir, config, resume_step):
        self.file = open(run_dir / "sink.txt", "a")
    def write(self, step, values): print(step, values["reward_length"], file=self.file)
    def write_evaluation(self, step, values): pass
    def close(self, ok): print("ok" if ok else "failed", file=self.file, flush=True)
"""


@pytest.fixture
def outside(tmp_path, arguments):
    """outside(*overrides): runs a configuration of a folder with the user's own parts."""
    folder = tmp_path / "mine"
    (folder / "parts").mkdir(parents=True)
    files = {"reward": REWARD, "parity": PARITY, "clip": SCHEDULE, "sink": SINK}
    for name, text in files.items():
        (folder / "parts" / f"{name}.py").write_text(text)
    (folder / "mine.yaml").write_text(
        f"extends: {ROOT}/examples/arithmetic/config.yaml\nrun_dir: run\n"
        "data: {verifier: parts/reward.py:reward, verifier_arguments: {bonus: 0.25}}\n"
        "clip: {schedule: parts/clip.py:Random}\nlog: {sinks: [jsonl, parts/sink.py:Sink]}\n"
    )

    def run(*overrides):
        given = [word for word in arguments(folder / "run") if "=" in word]
        command = [sys.executable, "-P", "-m", "megatron_gpc", "train", "mine.yaml"]
        return folder, subprocess.run(
            [*command, *given, *overrides],
            capture_output=True,
            text=True,
            timeout=300,
            cwd=folder,
            env=os.environ | {"PYTHONPATH": own_search_path()},
        )

    return run


def test_a_run_with_parts_of_ones_own_on_two_ranks(outside):
    folder, done = outside("train.steps=2", "parallel.tp=2")
    assert done.returncode == 0, done.stderr
    one, two = metrics(folder / "run")
    assert one["reward"] >= 0.25 and one["reward_length"] > 1
    assert 0.1 <= one["eps_high_at_p0"] <= 0.3 and one["eps_high_at_p0"] != two["eps_high_at_p0"]
    written = (folder / "run" / "sink.txt").read_text().splitlines()
    assert written == [f"{step['step']} {step['reward_length']}" for step in (one, two)] + ["ok"]


def test_an_error_of_a_reward_ends_the_run_by_name_with_its_traceback(outside, tmp_path):
    parity = tmp_path / "mine" / "parts" / "parity.py"
    parity.write_text(PARITY.replace("FAIL = None", "class Any:\n    def __eq__(self, other): "
                                     "return 'answer' not in other\nFAIL = Any()"))  # fmt: skip
    folder, done = outside("train.steps=2")
    assert done.returncode == 1
    assert "ValueError: as asked" in done.stderr and "Traceback" in done.stderr
    where = f"{folder}/parts/reward.py:reward failed at "
    assert where in done.stderr and "train.jsonl:" in done.stderr
    assert "failed" in (folder / "run" / "sink.txt").read_text()


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("data.verifier_arguments={}", "data.verifier: .*missing a required argument: 'bonus'"),
        ("clip.schedule=parts/clip.py:Randon", "did you mean 'Random'"),
        ("log.sinks=[jsonl, parts/none.py:Sink]", "parts/none.py is not there"),
        ("data.verifier=parts/clip.py:Random", "data.verifier: "),
    ],
)
def test_a_dry_run_refuses_parts_in_one_line(outside, override, says):
    _, done = outside("--dry-run", override)
    assert done.returncode == 2 and len(done.stderr.strip().splitlines()) == 1, done.stderr
    assert re.search(says, done.stderr)


def test_a_dry_run_shows_where_the_parts_are(outside):
    folder, done = outside("--dry-run")
    assert done.returncode == 0, done.stderr
    for file in ("parts/reward.py:reward", "parts/clip.py:Random", "parts/sink.py:Sink"):
        assert f"{folder}/{file}" in done.stdout
