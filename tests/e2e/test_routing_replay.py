"""A mixture of experts trained on its rollout's routes, saved and replayed."""

from __future__ import annotations

import json

import pytest
from commands import command_line, metrics
from compare_runs import untimed
from tiny import byte_tokenizer, run_config
from tiny_models import make_model

LAYOUT = ("parallel.tp=2", "parallel.sequence_parallel=true", "parallel.dp=2", "parallel.ep=2")


@pytest.mark.slow
def test_tokens_are_trained_where_the_server_sent_them_and_so_are_saved_ones(tmp_path):
    hf = byte_tokenizer(tmp_path / "hf")
    tokens = {"vocab_size": 256, "eos_token_id": 0}
    make_model("qwen3_moe-some-dense", **tokens).save_pretrained(hf)
    rows = [json.dumps({"prompt": f"{n}+{n}=", "label": 2 * n}) for n in range(1, 9)]
    (tmp_path / "prompts.jsonl").write_text("\n".join(rows))
    run_config(tmp_path, hf, "train.steps=2")
    given = ("train", str(tmp_path / "config.yaml"), "train.steps=2", *LAYOUT)
    replayed, first = "train.routing_replay=true", tmp_path / "first"
    saved = command_line(*given, f"run_dir={first}", replayed, "rollout.save_samples=true")
    assert saved.returncode == 0, saved.stderr
    for step in metrics(first):
        assert step["routing_changed"] == 0 and step["logp_gap_max"] < 1e-4
    again = command_line(*given, f"run_dir={tmp_path}/again", replayed, f"rollout.replay={first}")
    assert again.returncode == 0, again.stderr
    steps_of_both = (untimed(tmp_path / run / "metrics.jsonl") for run in ("first", "again"))
    for one, other in zip(*steps_of_both, strict=True):
        assert other.items() <= one.items() and "routing_changed" in other
    plain = tmp_path / "plain"
    free = command_line(*given, f"run_dir={plain}", "rollout.save_samples=true")
    assert free.returncode == 0, free.stderr
    for dry in ((), ("--dry-run",)):
        refused = command_line(
            *given, *dry, f"run_dir={tmp_path}/no", replayed, f"rollout.replay={plain}"
        )
        assert refused.returncode == 2 and "does not say which experts" in refused.stderr
