"""Evaluation: pass@k, its sampling, and what it refuses."""

from __future__ import annotations

import pytest
from tiny import run_config

from megatron_gpc.cli import main
from megatron_gpc.config.file import load
from megatron_gpc.evaluate import results
from megatron_gpc.metrics.pass_at_k import pass_ks
from megatron_gpc.rollout.evaluation import as_evaluated
from megatron_gpc.types import Prompt, Sample


def test_results_are_means_over_prompts():
    rewards = [[1.0, 0.0, 0.0, 0.0], [0.0] * 4]
    samples = [
        Sample(
            Prompt(p, "", (5,), p),
            i,
            (7, 1),
            (-1.0, -1.0),
            f"{i}",
            "stop",
            (),
            reward,
            reward > 0,
            {"words": reward * 3},
        )  # fmt: skip
        for p, row in enumerate(rewards)
        for i, reward in enumerate(row)
    ]
    found = results(samples, 4, (1, 2, 4))
    assert found["mean"] == 0.125
    assert found["pass"] == {"1": 0.125, "2": 0.25, "4": 0.5}
    assert [row["right"] for row in found["by_prompt"]] == [1, 0]
    assert found["scores"] == {"words": 0.375}
    assert found["mean_tokens"] == 2 and found["truncated"] == 0


def test_left_out_sampling_is_that_of_training_without_a_penalty(tmp_path):
    plain = run_config(tmp_path, tmp_path, "rollout.overlong=penalty", "rollout.temperature=0.9")
    assert as_evaluated(plain).rollout.temperature == 0.9
    assert as_evaluated(plain).rollout.overlong == "keep"
    given = load(tmp_path / "config.yaml", ["eval.temperature=0.7", "eval.max_response_tokens=5"])
    assert as_evaluated(given).rollout.temperature == 0.7
    assert as_evaluated(given).rollout.max_response_tokens == 5


def test_k_is_held_to_the_number_of_samples(tmp_path):
    config = run_config(tmp_path, tmp_path, "eval.samples=12")
    assert pass_ks(config.eval) == [1, 2, 4, 8]
    assert main(["eval", str(tmp_path / "config.yaml"), "eval.pass_k=[100]"]) == 2


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ([], "eval.prompts is not set"),
        (["eval.prompts=p.jsonl", "--checkpoint", "nowhere"], "nowhere: there is no such"),
        (["eval.prompts=p.jsonl", "--checkpoint", "."], "is no Hugging Face folder"),
        (["eval.prompts=p.jsonl", "--checkpoint", "run"], "no complete checkpoint yet"),
    ],
)
def test_what_cannot_be_evaluated_is_refused_with_code_2(
    model_a, tmp_path, monkeypatch, capsys, more, says
):
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    run_config(tmp_path, model_a)
    monkeypatch.chdir(tmp_path)
    assert main(["eval", "config.yaml", *more]) == 2
    assert says in capsys.readouterr().err
