"""Hugging Face -> Megatron -> Hugging Face gives every bit back, a tensor at a time."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tiny_models import Checkpoint, Checkpoints, content, names, same
from tool_scripts import CARRIED, start

from megatron_gpc.errors import UserError
from megatron_gpc.weights import HFReader, family_of, places_of, to_megatron
from megatron_gpc.weights.convert import hf_to_megatron, megatron_to_hf
from megatron_gpc.weights.hf_files import INDEX, SINGLE
from megatron_gpc.weights.megatron_files import MegatronReader, write_megatron


@pytest.mark.parametrize("max_shard_bytes", [10**9, 30_000], ids=["one file", "several"])
def test_every_family_comes_back_bit_for_bit_from_one_file_and_from_several(
    checkpoint: Checkpoint, tmp_path: Path, max_shard_bytes: int
) -> None:
    source = checkpoint.folder
    for turn in ("first", "second"):  # the second reads what the first wrote, shards or not
        hf_to_megatron(source, tmp_path / f"{turn}-megatron")
        source = tmp_path / turn
        megatron_to_hf(tmp_path / f"{turn}-megatron", source, max_shard_bytes=max_shard_bytes)
    assert (SINGLE in names(source)) == (max_shard_bytes == 10**9)
    assert same(content(source), checkpoint.tensors())
    ours, theirs = source / "config.json", checkpoint.folder / "config.json"
    assert ours.read_bytes() == theirs.read_bytes()


def test_transformers_loads_every_family_as_it_is(checkpoint: Checkpoint, tmp_path: Path) -> None:
    hf_to_megatron(checkpoint.folder, tmp_path / "megatron")
    megatron_to_hf(tmp_path / "megatron", tmp_path / "hf")
    models = [
        transformers.AutoModelForCausalLM.from_pretrained(folder)
        for folder in (checkpoint.folder, tmp_path / "hf")
    ]
    assert same(*(dict(model.state_dict()) for model in models))


@pytest.mark.parametrize("tp", [2, 3])
def test_padding_of_any_layout_is_taken_off(
    checkpoints: Checkpoints, tmp_path: Path, tp: int
) -> None:
    checkpoint = checkpoints["qwen2-untied"]  # 131 tokens: 256 rows, or 384 where tp is 3
    config, family = checkpoint.config, family_of(checkpoint.config)
    reader, folder = HFReader(checkpoint.folder), tmp_path / "megatron"
    folder.mkdir()
    found = places_of(family.params(config, tp), family.model_fields(config))
    write_megatron(
        folder,
        ((p, to_megatron(p.param, [reader.get(name) for name in p.param.hf])) for p in found),
        max_file_bytes=30_000,
    )
    assert len(list(folder.glob("*.distcp"))) > 2
    megatron_to_hf(folder, tmp_path / "hf", hf=checkpoint.folder)
    assert same(content(tmp_path / "hf"), checkpoint.tensors())


def test_the_scripts_convert_there_and_back_with_everything_that_goes_along(
    single: Path, tmp_path: Path
) -> None:
    new = tmp_path / "new"
    there = ("convert_hf_to_megatron", "--hf", single, "--out", new / "megatron")
    back = ("convert_megatron_to_hf", "--checkpoint", new / "megatron", "--out", new / "hf")
    for arguments in (there, (*back, "--max-shard-gb", "0.00003")):
        script = start(*arguments)
        said, shown = script.communicate(timeout=60)
        assert script.returncode == 0, shown
        assert "100%" in shown and "is ready" in said
    carried = {*CARRIED, "config.json", "generation_config.json"}
    assert names(new) == {"megatron", "hf"}
    assert names(new / "megatron" / "hf") == carried
    assert names(new / "hf") > carried | {INDEX}
    for name in carried:
        assert (new / "hf" / name).read_bytes() == (single / name).read_bytes()
    assert same(content(new / "hf"), content(single))


def test_a_new_dtype_is_written_and_said(single: Path, tmp_path: Path) -> None:
    want = {name: tensor.bfloat16() for name, tensor in content(single).items()}
    hf_to_megatron(single, tmp_path / "megatron", torch.bfloat16)
    assert MegatronReader(tmp_path / "megatron").dtypes() == {torch.bfloat16}
    megatron_to_hf(tmp_path / "megatron", tmp_path / "hf")
    megatron_to_hf(tmp_path / "megatron", tmp_path / "wide", dtype=torch.float32)
    assert same(content(tmp_path / "hf"), want)
    assert content(tmp_path / "wide")["model.norm.weight"].dtype is torch.float32
    for folder, dtype in (("megatron/hf", "bfloat16"), ("hf", "bfloat16"), ("wide", "float32")):
        assert json.loads((tmp_path / folder / "config.json").read_text())["dtype"] == dtype


def test_weights_that_training_made_float32_are_said_to_be(single: Path, tmp_path: Path) -> None:
    config = json.loads((single / "config.json").read_text())
    (single / "config.json").write_text(json.dumps({**config, "dtype": "bfloat16"}))
    hf_to_megatron(single, tmp_path / "megatron")
    megatron_to_hf(tmp_path / "megatron", tmp_path / "hf")
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["dtype"] == "float32"
    assert same(content(tmp_path / "hf"), content(single))


def test_dtypes_may_differ_between_parameters_but_not_between_layers_of_one(
    single: Path, tmp_path: Path
) -> None:
    tensors = load_file(single / SINGLE)
    for layer in (0, 1):
        name = f"model.layers.{layer}.mlp.down_proj.weight"
        tensors[name] = tensors[name].bfloat16()
        save_file(tensors, single / SINGLE)
        if layer == 0:
            with pytest.raises(UserError, match="layers.1.mlp.down_proj.weight is torch.float32"):
                hf_to_megatron(single, tmp_path / "megatron")
    hf_to_megatron(single, tmp_path / "megatron")
    megatron_to_hf(tmp_path / "megatron", tmp_path / "hf")
    assert same(content(tmp_path / "hf"), tensors)


MEMORY = """
import re, sys
from pathlib import Path
from megatron_gpc.weights import convert
status = Path("/proc/self/status")
peak = lambda: int(re.search(r"VmHWM:\\s+(\\d+) kB", status.read_text())[1]) * 1024
before = peak()
getattr(convert, sys.argv[1])(Path(sys.argv[2]), Path(sys.argv[3]))
print(peak() - before)
"""  # VmHWM and not getrusage's, which a child inherits from the process that started it


@pytest.mark.slow
def test_memory_is_that_of_the_largest_tensor_both_ways(large: Path, tmp_path: Path) -> None:
    size, source = 2**26, large
    for way in ("hf_to_megatron", "megatron_to_hf"):
        done = subprocess.run(
            [sys.executable, "-c", MEMORY, way, str(source), str(tmp_path / way)],
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode == 0, done.stderr
        print(way, int(done.stdout) / size, "of the largest tensor")
        assert int(done.stdout) < 2 * size + 2**25
        source = tmp_path / way
    assert (source / SINGLE).stat().st_size > 3 * size
