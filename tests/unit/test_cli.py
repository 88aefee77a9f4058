"""What the command line refuses before any process starts, and how it says so."""

from __future__ import annotations

import json

import pytest
from tiny import byte_tokenizer, hollow_weights, run_config

from megatron_gpc.cli import COMMANDS, main

MODEL = {
    **{"model_type": "qwen2", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2},
    **{"vocab_size": 100, "num_attention_heads": 4, "max_position_embeddings": 64},
}
MOE = {
    **{**MODEL, "model_type": "qwen3_moe", "num_experts": 4, "num_experts_per_tok": 2},
    **{"moe_intermediate_size": 32, "norm_topk_prob": True},
}


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("", "name a command"),
        ("trian config.yaml", "no command 'trian'; did you mean 'train'?"),
        ("--verbose", "no command '--verbose'; megatron-gpc --help"),
        ("convert", "convert what?; there are convert hf-to-megatron, convert megatron-to"),
        ("convert hf --hf x", "no command 'convert hf'; there are convert hf-to-megatron"),
        (
            "convert hf-to-megatron --hf x",
            "arguments are required: --out; see megatron-gpc convert",
        ),
        ("train", "arguments are required: config; see megatron-gpc train --help"),
        ("train config.yaml --dry", "config.yaml"),
        ("train config.yaml --dyr-run", "unrecognized arguments: --dyr-run"),
        ("estimate-memory c.yaml --gpu-gib -1", "expected a number from 0.001 to"),
    ],
)
def test_what_cannot_be_understood_is_said_in_one_line_with_code_2(
    tmp_path, monkeypatch, capsys, words, says
):
    monkeypatch.chdir(tmp_path)
    assert main(words.split()) == 2
    said = capsys.readouterr()
    assert says in said.err and said.err.startswith("megatron-gpc: ") and not said.out
    assert said.err.count("\n") == 1


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_says_what_it_takes(capsys, command):
    with pytest.raises(SystemExit) as left:
        main([*command.split(), "--help"])
    assert left.value.code == 0
    assert capsys.readouterr().out.startswith(f"usage: megatron-gpc {command} ")


@pytest.mark.parametrize("words", [["--help"], ["convert", "--help"]])
def test_the_list_of_commands_names_each_that_is_for_users(capsys, words):
    assert main(words) == 0
    listed = [line.strip() for line in capsys.readouterr().out.splitlines()]
    for command, does in COMMANDS.items():
        named = any(line.startswith(f"{command} ") and line.endswith(does) for line in listed)
        assert named == (does != "" and (words[0] == "--help" or command.startswith("convert ")))


def test_options_may_stand_between_the_overrides(tmp_path, capsys):
    run_config(tmp_path, tmp_path)
    given = ["train", "seed=3", "--dry-run", str(tmp_path / "config.yaml")]
    assert main(given) == 2, "the file comes first"
    assert "seed=3" in capsys.readouterr().err
    (tmp_path / "config.json").write_text("")
    assert main(["train", str(tmp_path / "config.yaml"), "--dry-run", "seed=x"]) == 2
    assert "seed" in capsys.readouterr().err, "heard"


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


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"num_hidden_layers": 3}, "num_layers is 3 and not 2"),
        ({"rope_theta": 5e5}, "rotary_base is 500000"),
        ({"vocab_size": 128}, "vocab_size is 128 and not 256"),
        ({"model_type": "llama"}, "model_type='llama' is not supported"),
        ("weights", "lacks"),
        ("folder", "is not there; name the folder of a checkpoint"),
        ("config.json", "is not a Hugging Face checkpoint"),
        (None, None),
    ],
    ids=str,
)
def test_a_reference_of_another_architecture_is_refused(tmp_path, capsys, change, says):
    model = {**MODEL, "vocab_size": 256, "num_key_value_heads": 2}
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "1+1=", "label": 2}\n')
    byte_tokenizer(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(model))
    hollow_weights(tmp_path)
    other = tmp_path / "other"
    if change != "folder":
        other.mkdir()
        changes = change if isinstance(change, dict) else {}
        (other / "config.json").write_text(json.dumps({**model, **changes}))
        if change == "weights":
            content = json.dumps({**model, "num_hidden_layers": 1})
            (other / "config.json").write_text(content)
        if changes.get("model_type") != "llama":
            hollow_weights(other)
        if change == "weights":
            (other / "config.json").write_text(json.dumps(model))
        if change == "config.json":
            (other / "config.json").unlink()
    run_config(tmp_path, tmp_path)
    given = [str(tmp_path / "config.yaml"), "kl.coef=0.1", f"kl.reference={other}", "--dry-run"]
    assert main(["train", *given]) == (2 if says else 0)
    said = capsys.readouterr().err
    assert not says or (said.startswith("megatron-gpc: kl.reference: ") and says in said)
    assert main(["train", *given[:1], *given[2:]]) == 0, "not looked at with kl.coef=0"
    assert "kl.reference is not used" in capsys.readouterr().err
