"""`megatron-gpc eval`: a checkpoint that training saved says what training said of it."""

from __future__ import annotations

import json

import pytest
from commands import CONFIG, command_line

pytestmark = pytest.mark.timeout(900)  # the first test waits for the example's start


def test_a_saved_checkpoint_gets_the_numbers_that_training_gave_its_weights(
    arguments, warm_start, tmp_path
):
    run_dir, held_out = tmp_path / "run", f"eval.prompts={warm_start}/heldout.jsonl"
    given = arguments(run_dir, "parallel.tp=2", "train.steps=1", held_out, "eval.samples=8")
    done = command_line(*given)
    assert done.returncode == 0, done.stderr
    said = [json.loads(line) for line in (run_dir / "eval.jsonl").read_text().splitlines()]

    # Overrides on both sides of an option.
    config, *overrides = given[1:]
    overrides.remove(f"run_dir={run_dir}")
    overrides.insert(0, f"run_dir={tmp_path}/another")
    done = command_line("eval", config, overrides[0], "--checkpoint", str(run_dir), *overrides[1:])
    assert done.returncode == 0, done.stderr
    (file,) = (run_dir / "evaluations").glob("*.json")
    assert file.name.startswith("step_000001-heldout-") and str(file) in done.stdout
    assert f"the result goes to {file}" in done.stderr
    found = json.loads(file.read_text())
    assert found["run"]["folder"] == str(run_dir) and found["settings"]["samples"] == 8
    assert found["mean"] == pytest.approx(said[-1]["eval_reward"], abs=1e-12)
    assert found["distinct_right"] == pytest.approx(said[-1]["eval_distinct_right"])
    assert list(found["pass"]) == ["1", "2", "4", "8"]
    assert found["pass"]["1"] == pytest.approx(found["mean"]), "rewards are 0 or 1"
    assert 0 < found["pass"]["1"] < found["pass"]["8"] <= 1
    assert len(found["by_prompt"]) == found["prompts"] == 90
    assert "mean@8" in done.stdout and "pass@8" in done.stdout
    assert not (tmp_path / "another").exists(), "it has nothing to do with the evaluated run"
    left = {f.name for f in (run_dir / "evaluations").iterdir()}
    assert left == {file.name, "logs"}, "the folder for the engines is gone"


def test_a_hugging_face_folder_is_evaluated_with_its_own_sampling(warm_start, tmp_path):
    out = tmp_path / "found.json"
    done = command_line(
        *("eval", str(CONFIG), f"model.hf={warm_start}", f"run_dir={tmp_path}/run"),
        *(f"eval.prompts={warm_start}/heldout.jsonl", "eval.samples=4", "eval.pass_k=[4,2]"),
        *("eval.top_k=1", "eval.max_response_tokens=9", "--out", str(out)),
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(out.read_text())
    assert found["distinct_right"] == pytest.approx(found["mean"]), "top_k=1: all samples agree"
    assert list(found["pass"]) == ["2", "4"]
    assert found["sampling"]["max_response_tokens"] == 9
