"""check_parity tells a right checkpoint from a wrong one, by exit code and in words."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from tiny_models import Checkpoints, content
from tool_scripts import call

from megatron_gpc.commands.parity import TEXTS, compare, prompts
from megatron_gpc.errors import UserError
from megatron_gpc.weights import write_hf
from megatron_gpc.weights.convert import hf_to_megatron


@pytest.fixture
def both(checkpoints: Checkpoints, tmp_path: Path) -> tuple[Path, Path]:
    hf = checkpoints["qwen3"].folder
    hf_to_megatron(hf, tmp_path / "converted")
    return hf, tmp_path / "converted"


def test_a_right_checkpoint_passes_at_a_parallel_layout(
    both: tuple[Path, Path], capfd: pytest.CaptureFixture[str]
) -> None:
    hf, converted = both
    assert call("check_parity", "--hf", hf, "--checkpoint", converted, "--tp", 2) == 0
    said = capfd.readouterr().out
    assert "the same" in said and "100.00% of 128 positions" in said and "1.00e-03" in said


def test_settings_in_their_old_places_compute_what_transformers_computes(
    checkpoints: Checkpoints, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    hf = tmp_path / "hf"
    shutil.copytree(checkpoints["qwen2-yarn"].folder, hf)
    config = json.loads((hf / "config.json").read_text())
    rope = config.pop("rope_parameters")
    config |= {
        "rope_theta": 5e5,
        "torch_dtype": config.pop("dtype"),
        "rope_scaling": {"type": "yarn", "factor": rope["factor"]},
        "original_max_position_embeddings": 16,
    }
    (hf / "config.json").write_text(json.dumps(config))
    hf_to_megatron(hf, tmp_path / "converted")
    assert call("check_parity", "--hf", hf, "--checkpoint", tmp_path / "converted") == 0
    assert "the same" in capfd.readouterr().out


def test_a_checkpoint_with_one_wrong_matrix_fails(
    both: tuple[Path, Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    hf, _ = both
    tensors = content(hf)
    tensors["model.layers.1.mlp.up_proj.weight"].mul_(1.01)
    write_hf(tmp_path / "wrong", tensors.items(), source=hf)
    hf_to_megatron(tmp_path / "wrong", tmp_path / "wrong-converted")
    arguments = ("--hf", hf, "--checkpoint", tmp_path / "wrong-converted")
    assert call("check_parity", *arguments) == 1
    assert "DIFFERENT" in capfd.readouterr().out


def test_what_cannot_be_compared_is_refused(
    both: tuple[Path, Path], capfd: pytest.CaptureFixture[str]
) -> None:
    hf, converted = both
    arguments = ("check_parity", "--hf", hf, "--checkpoint", converted)
    assert call(*arguments, "--tp", 3) == 2
    assert "parallel.tp=3 does not divide" in capfd.readouterr().err
    assert call(*arguments, "--ep", 2) == 2
    assert "the model has no experts" in capfd.readouterr().err
    (converted / "__0_0.distcp").unlink()
    assert call(*arguments) == 2
    assert f"{converted}/__0_0.distcp (with " in capfd.readouterr().err


def test_prompts_are_texts_where_there_is_a_tokenizer_and_random_otherwise(
    with_tokenizer: Path, checkpoints: Checkpoints
) -> None:
    texts = prompts(with_tokenizer)
    assert [len(ids) for ids in texts] == [len(text.encode()) for text in TEXTS]
    drawn = prompts(checkpoints["qwen3"].folder)
    assert [len(ids) for ids in drawn] == [32] * 4 and max(max(ids) for ids in drawn) < 131
    (with_tokenizer / "tokenizer.json").write_text("{")
    with pytest.raises(UserError, match="cannot load the tokenizer"):
        prompts(with_tokenizer)


def test_the_comparison_is_of_log_probabilities_and_sees_what_is_not_a_number() -> None:
    logits_SV = torch.tensor([[0.0, 1.0, 2.0], [3.0, 1.0, 0.0]])
    moved_SV = logits_SV + 7.0  # the same distribution
    found = compare([moved_SV, logits_SV], [logits_SV, logits_SV])
    assert found.largest < 1e-6 and found.agreement == 1.0 and found.positions == 4
    other_SV = torch.tensor([[0.0, 2.0, 1.0], [3.0, 1.0, 0.0]])
    found = compare([other_SV], [logits_SV])
    assert found.largest == pytest.approx(1.0) and found.agreement == 0.5
    assert found.mean == pytest.approx(2 / 6)
    broken_SV = torch.tensor([[0.0, float("nan"), 2.0], [3.0, 1.0, 0.0]])
    assert not compare([broken_SV], [logits_SV]).largest <= 1.0
