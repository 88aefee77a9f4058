"""Damaged checkpoints through the tools: exit code 2, a message that names it, nothing left."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from damage import DAMAGE as HF_DAMAGE
from damage import cut, rewrite_tensors, small_disk
from tiny import run_config
from tiny_models import Checkpoints
from tool_scripts import call

from megatron_gpc.config.file import dump
from megatron_gpc.weights.convert import hf_to_megatron

QKV = "decoder.layers.self_attention.linear_qkv.weight"


def tree(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def refused(capsys: pytest.CaptureFixture[str], root: Path, name: str, *arguments: object) -> str:
    """What a tool says when it refuses; nothing under root may have come or gone."""
    before = tree(root)
    assert call(name, *arguments) == 2
    assert tree(root) == before
    said = capsys.readouterr().err
    assert "Traceback" not in said
    return said.strip().splitlines()[-1]


@pytest.mark.parametrize("damage", HF_DAMAGE)
def test_a_damaged_hugging_face_folder_is_refused(
    damage: str, request: pytest.FixtureRequest, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fixture, inflict, says = HF_DAMAGE[damage]
    folder = request.getfixturevalue(fixture)
    inflict(folder)
    out = tmp_path / "out"
    message = refused(capsys, tmp_path, "convert_hf_to_megatron", "--hf", folder, "--out", out)
    assert says in message and str(folder) in message


def rewrite_config(folder: Path, **settings: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **settings}))


HF_CONFIG_DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "no config": (lambda f: (f / "config.json").unlink(), "(no config.json)"),
    "config is no JSON": (lambda f: cut(f / "config.json", 50), "cannot be read as JSON"),
    "another architecture": (
        lambda f: rewrite_config(f, model_type="llama"),
        "model_type='llama' is not supported; supported are qwen2, qwen3, qwen2_moe, qwen3_moe",
    ),
    "a size is absent": (lambda f: rewrite_config(f, hidden_size=None), "lacks hidden_size"),
    "config of a larger model": (
        lambda f: rewrite_config(f, num_hidden_layers=3, layer_types=None),
        "lacks model.layers.2.",
    ),
    "config of an untied model": (
        lambda f: rewrite_config(f, tie_word_embeddings=False),
        "lacks lm_head.weight (for output_layer.weight)",
    ),
    "a head that differs although tied": (
        lambda f: rewrite_tensors(f, lambda t: t.update({"lm_head.weight": torch.ones(131, 32)})),
        "lm_head.weight in",
    ),
    "quantized": (
        lambda f: rewrite_config(f, quantization_config={"quant_method": "awq"}),
        "quantized checkpoints are not supported",
    ),
    "parts of one parameter in two dtypes": (
        lambda f: rewrite_tensors(f, lambda t: t.update({
            "model.layers.1.mlp.up_proj.weight": torch.ones(48, 32).half()})),
        "model.layers.1.mlp.up_proj.weight is torch.float16, but",
    ),
}  # fmt: skip


@pytest.mark.parametrize("damage", HF_CONFIG_DAMAGE)
def test_a_folder_whose_configuration_does_not_fit_is_refused(
    damage: str, single: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    inflict, says = HF_CONFIG_DAMAGE[damage]
    inflict(single)
    out = tmp_path / "out"
    assert says in refused(capsys, tmp_path, "convert_hf_to_megatron", "--hf", single, "--out", out)


def redescribe(folder: Path, change: Callable[[Any], object]) -> None:
    """Change a checkpoint's description."""
    file = folder / ".metadata"
    metadata = pickle.loads(file.read_bytes())
    change(metadata)
    file.write_bytes(pickle.dumps(metadata))


def overwrite(file: Path, offset: int, content: bytes) -> None:
    with file.open("r+b") as stream:
        stream.seek(offset)
        stream.write(content)


def stored(metadata: Any, key: str) -> Any:
    """Where the first piece of a key lies."""
    return next(info for index, info in metadata.storage_data.items() if index.fqn == key)


def exchange(metadata: Any) -> None:
    """Say of a piece that it lies where another one does."""
    other = stored(metadata, "decoder.final_layernorm.weight")
    vars(stored(metadata, QKV)).update(vars(other))


def spoil(folder: Path) -> None:
    """Write over the beginning of the first tensor, which is torch.save's directory of it."""
    overwrite(folder / "__0_0.distcp", 0, b"spoiled" * 40)


def forget_where(metadata: Any) -> None:
    for index in [index for index in metadata.storage_data if index.fqn == QKV]:
        del metadata.storage_data[index]


MEGATRON_DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "no folder": (shutil.rmtree, "no such folder"),
    "half-written": (
        lambda f: (f / "metadata.json").unlink(),
        "is not a complete distributed checkpoint (no metadata.json)",
    ),
    "format file is no JSON": (lambda f: cut(f / "metadata.json", 9), "not a checkpoint's"),
    "format file of something else": (
        lambda f: (f / "metadata.json").write_text("[]"), "not a checkpoint's"),
    "another format": (
        lambda f: (f / "metadata.json").write_text('{"sharded_backend": "zarr"}'),
        "format 'zarr' is not supported, only torch_dist",
    ),
    "no description": (lambda f: (f / ".metadata").unlink(), ".metadata is absent"),
    "truncated description": (
        lambda f: cut(f / ".metadata", 500), "not a checkpoint's description"),
    "empty description": (lambda f: cut(f / ".metadata", 0), "not a checkpoint's description"),
    "description of something else": (
        lambda f: (f / ".metadata").write_bytes(pickle.dumps([1])),
        "not a checkpoint's description",
    ),
    "description is text": (
        lambda f: (f / ".metadata").write_text("<html>"), "not a checkpoint's description"),
    "a file is absent": (
        lambda f: (f / "__0_0.distcp").unlink(),
        "__0_0.distcp (with embedding.word_embeddings.weight) is absent",
    ),
    "a file is truncated": (
        lambda f: cut(f / "__0_0.distcp", (f / "__0_0.distcp").stat().st_size - 1),
        "__0_0.distcp ends inside decoder.layers.mlp.linear_fc2.weight[1]: it is truncated",
    ),
    "a file is spoiled inside": (
        spoil, "__0_0.distcp: cannot read embedding.word_embeddings.weight"),
    "a piece of another shape than described": (
        lambda f: redescribe(f, exchange), f"__0_0.distcp: cannot read {QKV}[0]"),
    "missing key": (
        lambda f: redescribe(f, lambda m: m.state_dict_metadata.pop(QKV)),
        f"lacks {QKV} (for model.layers.0.self_attn.q_proj.weight, ",
    ),
    "missing layer": (
        lambda f: redescribe(f, lambda m: m.state_dict_metadata[QKV].chunks.pop()),
        f"{QKV}[1] in ",
    ),
    "missing file entry": (
        lambda f: redescribe(f, forget_where), f"does not say which file holds {QKV}[0]"),
    "surplus key": (
        lambda f: redescribe(f, lambda m: m.state_dict_metadata.update({
            "decoder.layers.mlp.router.weight": m.state_dict_metadata[QKV]})),
        "leaves no place for: decoder.layers.mlp.router.weight",
    ),
    "misshapen tensor": (
        lambda f: redescribe(f, lambda m: setattr(
            m.state_dict_metadata[QKV], "size", torch.Size((2, 47, 32)))),
        "has shape [2, 47, 32], but the model's config.json says [2, 48, 32]",
    ),
    "8-bit weights": (
        lambda f: redescribe(f, lambda m: setattr(
            m.state_dict_metadata[QKV].properties, "dtype", torch.float8_e4m3fn)),
        f"{QKV} in ",
    ),
    "configuration is gone": (
        lambda f: (f / "hf" / "config.json").unlink(), "(no config.json)"),
    "whole hf folder is gone": (lambda f: shutil.rmtree(f / "hf"), "with --hf"),
    "configuration of another architecture": (
        lambda f: rewrite_config(f / "hf", model_type="gpt2"), "'gpt2' is not supported"),
    "configuration of a deeper model": (
        lambda f: rewrite_config(f / "hf", num_hidden_layers=3, layer_types=None),
        "config.json says [3, "),
    "configuration of an untied model": (
        lambda f: rewrite_config(f / "hf", tie_word_embeddings=False),
        "lacks output_layer.weight (for lm_head.weight)",
    ),
    "configuration of a larger vocabulary": (
        lambda f: rewrite_config(f / "hf", vocab_size=257),
        "has shape [256, 32], but the model's config.json says [257, 32]",
    ),
}  # fmt: skip


@pytest.mark.parametrize("damage", MEGATRON_DAMAGE)
def test_a_damaged_distributed_checkpoint_is_refused(
    damage: str, converted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    inflict, says = MEGATRON_DAMAGE[damage]
    inflict(converted)
    arguments = ("--checkpoint", converted, "--out", tmp_path / "out")
    message = refused(capsys, tmp_path, "convert_megatron_to_hf", *arguments)
    assert says in message
    assert str(converted) in message or "config.json" in message


def test_a_lost_expert_is_named(
    checkpoints: Checkpoints, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, key = tmp_path / "moe", "decoder.layers.mlp.experts.experts.linear_fc2.weight"
    hf_to_megatron(checkpoints["qwen3_moe"].folder, folder)
    redescribe(folder, lambda m: m.state_dict_metadata[key].chunks.pop(3))
    arguments = ("--checkpoint", folder, "--out", tmp_path / "out")
    message = refused(capsys, tmp_path, "convert_megatron_to_hf", *arguments)
    assert f"{key}[0, 3] in {folder} is not complete" in message


def test_a_run_whose_model_is_gone_or_that_is_named_instead_of_its_checkpoint_is_told_so(
    converted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    step = tmp_path / "run" / "checkpoints" / "step_000007"
    shutil.copytree(converted, step)
    shutil.rmtree(step / "hf")
    text = dump(run_config(tmp_path, tmp_path / "vanished"))
    (tmp_path / "run" / "config.yaml").write_text(text)
    name, out = "convert_megatron_to_hf", ("--out", tmp_path / "out")
    message = refused(capsys, tmp_path, name, "--checkpoint", step, *out)
    assert "vanished, which is there no more; give the model's Hugging Face folder" in message
    message = refused(capsys, tmp_path, name, "--checkpoint", tmp_path / "run", *out)
    assert "/run is not a complete" in message and "did you mean" in message
    assert call(name, "--checkpoint", step, *out, "--hf", converted / "hf") == 0


@pytest.mark.parametrize("kind", ["folder", "file", "below a file"])
@pytest.mark.parametrize("way", ["there", "back"])
def test_an_output_that_is_in_the_way_is_left_alone(
    way: str, kind: str, converted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, says = tmp_path / "full", "is not an empty folder; give another, or remove it first"
    if kind == "folder":
        out.mkdir()
        (out / "precious").touch()
    else:
        out.touch()
    if kind == "below a file":
        out, says = out / "below", "cannot be written: "
    script = {
        "there": ("convert_hf_to_megatron", "--hf", tmp_path / "single"),
        "back": ("convert_megatron_to_hf", "--checkpoint", converted),
    }[way]
    message = refused(capsys, tmp_path, *script, "--out", out)
    assert says in message and str(out) in message


def test_a_full_disk_is_named_with_tensor_and_folder(
    converted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = ("--out", tmp_path / "new" / "deeper" / "out")
    single = ("--hf", tmp_path / "single")
    with small_disk(20_000):
        message = refused(capsys, tmp_path, "convert_hf_to_megatron", *single, *out)
    assert "cannot write embedding.word_embeddings.weight (model.embed_tokens.weight): " in message
    assert "File too large" in message
    checkpoint = ("--checkpoint", converted)
    with small_disk(20_000):
        message = refused(capsys, tmp_path, "convert_megatron_to_hf", *checkpoint, *out)
    assert "cannot write tensor model.embed_tokens.weight: File too large" in message


def test_numbers_that_float16_cannot_represent_are_named(
    single: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rewrite_tensors(single, lambda t: t["model.norm.weight"].fill_(1e5))
    half, out = ("--dtype", "float16"), ("--out", tmp_path / "out")
    says = "model.norm.weight has numbers as large as 1e+05, which torch.float16 cannot represent"
    assert says in refused(capsys, tmp_path, "convert_hf_to_megatron", "--hf", single, *out, *half)
    hf_to_megatron(single, tmp_path / "converted")
    script = ("convert_megatron_to_hf", "--checkpoint", tmp_path / "converted")
    assert says in refused(capsys, tmp_path, *script, *out, *half)
