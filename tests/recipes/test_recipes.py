"""Every recipe resolves, fits its GPUs by bookkeeping, and would be accepted by `--dry-run`.

The folders beside this file hold the sizes of the public models, as their config.json.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import yaml
from commands import ROOT
from tiny import byte_tokenizer, hollow_weights

from megatron_gpc.cli import main
from megatron_gpc.config.file import load
from megatron_gpc.config.layout import world_size
from megatron_gpc.doctor.memory import GIB, estimate, lines
from megatron_gpc.errors import UserError
from megatron_gpc.weights.folders import read_hf_config

NODES = {"qwen2.5-math-7b": 1, "qwen2.5-7b": 1, "qwen3-8b": 2, "qwen3-32b": 8, "qwen3-30b-a3b": 4}
PARAMETERS = {  # as published [10^9]
    **{"qwen2.5-math-7b": 7.62, "qwen2.5-7b": 7.62, "qwen3-8b": 8.19, "qwen3-32b": 32.8},
    "qwen3-30b-a3b": 30.5,
}
HERE = Path(__file__).parent


def file(name: str) -> Path:
    return ROOT / "examples" / name / "config.yaml"


@pytest.mark.parametrize("name", NODES)
def test_a_recipe_is_accepted_and_uses_all_of_its_gpus(name, tmp_path, capsys):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "1+1=", "label": "2"}\n')
    model = byte_tokenizer(hollow_weights(shutil.copytree(HERE / name, tmp_path / "model")))
    with_sglang = tmp_path / "python"  # an interpreter that has every package
    with_sglang.write_text("#!/bin/sh\necho True\n")
    with_sglang.chmod(0o755)
    there = [
        *(f"model.hf={model}", f"data.prompts={prompts}", f"eval.prompts={prompts}"),
        f"sglang.python={with_sglang}",
    ]
    assert main(["train", str(file(name)), *there, "--dry-run"]) == 0
    resolved = yaml.safe_load(capsys.readouterr().out)
    assert resolved["train"]["steps"] == 400
    config = load(file(name))
    assert world_size(config.parallel) == 8 * NODES[name]
    assert config.rollout.prompts_per_step * config.rollout.group_size == 512
    engines = config.rollout.server.engines * config.sglang.args.get("tp_size", 1)
    assert engines == 8, "engines on every GPU of a node"
    assert config.run_dir == ROOT / "runs" / name, "paths are those of the recipe's folder"


@pytest.mark.parametrize("name", NODES)
def test_trainer_and_engine_fit_a_gpu_with_room_to_spare(name):
    config, hf = load(file(name)), read_hf_config(HERE / name)
    found = estimate(config, hf, world_size(config.parallel))
    assert found.parameters / 1e9 == pytest.approx(PARAMETERS[name], rel=0.01)
    fraction = config.sglang.args["mem_fraction_static"]
    assert found.trainer + fraction * 79.6 * GIB < 0.9 * 79.6 * GIB
    said = "\n".join(lines(found, 79.6, fraction))
    assert said in (ROOT / "examples" / name / "README.md").read_text()
    cache = (fraction * 79.6 * GIB - found.engine_weights) / found.kv_token
    assert cache > 8 * config.rollout.max_response_tokens, "at least a group at full length"


def test_what_a_recipe_still_needs_is_said(tmp_path, capsys):
    name = "qwen2.5-7b"
    command = ["train", str(file(name)), "--dry-run"]
    assert main([*command, f"model.hf={tmp_path / 'absent'}"]) == 2
    assert "model.hf" in (said := capsys.readouterr().err) and "docs/recipes.md" in said
    assert main([*command, f"model.hf={HERE / name}", f"data.prompts={tmp_path / 'no.jsonl'}"]) == 2
    assert "data.prompts" in (said := capsys.readouterr().err) and "no.jsonl is not there" in said


def test_a_file_has_the_keys_of_what_it_extends_and_its_own_over_them(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "base.yaml").write_text(
        "run_dir: run\nmodel: {hf: m}\ndata: {prompts: p, verifier: math}\ntrain: {steps: 7}\n"
    )
    (tmp_path / "sub" / "c.yaml").write_text(
        "extends: ../base.yaml\nmodel: {hf: other}\ntrain: {epochs: 3}\n"
    )
    config = load(tmp_path / "sub" / "c.yaml", ["train.epochs=4"])
    assert (config.train.steps, config.train.epochs) == (7, 4)
    assert config.run_dir == tmp_path / "run"
    assert config.model.hf == tmp_path / "sub" / "other"
    (tmp_path / "base.yaml").write_text("train: {steps: none}\n")
    with pytest.raises(UserError, match=r"base\.yaml: train\.steps: .*got 'none'"):
        load(tmp_path / "sub" / "c.yaml")
    (tmp_path / "base.yaml").write_text("extends: sub/c.yaml\n")
    with pytest.raises(UserError, match="extends itself"):
        load(tmp_path / "sub" / "c.yaml")
