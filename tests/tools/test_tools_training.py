"""From Hugging Face through a training run and back, by the command line alone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from commands import CONFIG, command_line, metrics
from tiny_models import content, names
from tool_scripts import call
from transformers import AutoModelForCausalLM, AutoTokenizer


def test_hugging_face_to_megatron_to_training_to_hugging_face(
    with_tokenizer: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    converted, run_dir = tmp_path / "converted", tmp_path / "run"
    assert call("convert_hf_to_megatron", "--hf", with_tokenizer, "--out", converted) == 0
    lines = [json.dumps({"prompt": f"{n}=", "label": n}) for n in range(100, 120)]
    (tmp_path / "prompts.jsonl").write_text("\n".join(lines) + "\n")
    done = command_line(
        *("train", str(CONFIG), f"run_dir={run_dir}", f"model.hf={converted}"),
        *("model.build=null", f"data.prompts={tmp_path}/prompts.jsonl", "eval.prompts=null"),
        *("parallel.tp=1", "parallel.pp=1", "train.steps=1", "optim.lr=1e-3"),
        *("rollout.prompts_per_step=4", "rollout.group_size=4", "train.micro_batch_size=16"),
    )
    assert done.returncode == 0, done.stderr
    (step,) = metrics(run_dir)
    assert step["logp_gap_max"] < 1e-4, "server and trainer have the same weights"

    saved, back = run_dir / "checkpoints" / "step_000001", tmp_path / "back"
    assert call("convert_megatron_to_hf", "--checkpoint", saved, "--out", back) == 0
    assert names(back) == names(with_tokenizer)
    before, after = content(with_tokenizer), content(back)
    assert {name: t.shape for name, t in before.items()} == {n: t.shape for n, t in after.items()}
    served = content(run_dir / "sync")  # what the rollout server was given last
    assert all(torch.equal(after[name], served[name]) for name in after)
    assert AutoModelForCausalLM.from_pretrained(back).config.vocab_size == 256
    assert AutoTokenizer.from_pretrained(back)("100=")["input_ids"]

    file = max(saved.glob("*.distcp"), key=lambda f: f.stat().st_size)
    spoiled = bytearray(file.read_bytes())
    spoiled[len(spoiled) // 2] ^= 1  # one bit, where only a checksum can tell
    file.write_bytes(spoiled)
    capsys.readouterr()
    assert call("convert_megatron_to_hf", "--checkpoint", saved, "--out", tmp_path / "no") == 2
    assert f"{file.name} is not what was written" in capsys.readouterr().err
    assert not (tmp_path / "no").exists()
