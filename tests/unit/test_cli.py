"""What the command line refuses before any process starts, and how it says so."""

from __future__ import annotations

import json

import pytest
from tiny import byte_tokenizer, hollow_weights, run_config

from megatron_gpc.cli import main

MODEL = {
    **{"model_type": "qwen2", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2},
    **{"vocab_size": 100, "num_attention_heads": 4, "max_position_embeddings": 64},
}
MOE = {
    **{**MODEL, "model_type": "qwen3_moe", "num_experts": 4, "num_experts_per_tok": 2},
    **{"moe_intermediate_size": 32, "norm_topk_prob": True},
}


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "config.json: cannot be read as JSON"),
        ("{}", "model_type=None is not supported"),
        (json.dumps({**MODEL, "model_type": "llama"}), "model_type='llama' is not supported"),
        (json.dumps({**MODEL, "num_key_value_heads": "2"}), "num_key_value_heads must be a"),
        (json.dumps({**MOE, "mlp_only_layers": 3}), "mlp_only_layers must be a list"),
    ],
)
def test_a_model_that_cannot_be_trained_is_refused_with_code_2(tmp_path, capsys, text, says):
    (tmp_path / "config.json").write_text(text)
    run_config(tmp_path, tmp_path)
    assert main(["train", str(tmp_path / "config.yaml"), "--dry-run"]) == 2
    said = capsys.readouterr()
    assert says in said.err and said.err.startswith("megatron-gpc: ") and not said.out


def test_models_that_can_be_trained_are_accepted(tmp_path, capsys):
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "1+1=", "label": 2}\n')
    byte_tokenizer(tmp_path)
    bytewise = {"vocab_size": 256, "num_key_value_heads": 2}
    for model in (MODEL, MOE):
        (tmp_path / "config.json").write_text(json.dumps({**model, **bytewise}))
        hollow_weights(tmp_path)
        run_config(tmp_path, tmp_path)
        assert main(["train", str(tmp_path / "config.yaml"), "--dry-run"]) == 0
