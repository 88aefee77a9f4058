"""Checkpoint folders are read and written exactly, a tensor at a time."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_models import Checkpoint, Checkpoints, content, names, same
from torch import Tensor

from megatron_gpc.errors import UserError
from megatron_gpc.weights import (
    SINGLE_HEADER_BYTES,
    HFReader,
    family_of,
    to_hf,
    to_megatron,
    write_hf,
    write_single,
)
from megatron_gpc.weights.hf_files import INDEX, SINGLE


def through_megatron(checkpoint: Checkpoint, folder: Path) -> Iterator[tuple[str, Tensor]]:
    reader = HFReader(folder)
    for param in family_of(checkpoint.config).params(checkpoint.config):
        whole = to_megatron(param, [reader.get(name) for name in param.hf])
        yield from zip(param.hf, to_hf(param, whole), strict=True)


@pytest.mark.parametrize("max_shard_bytes", [10**9, 30_000])
def test_a_checkpoint_of_any_family_comes_back_bit_for_bit_from_one_file_and_from_several(
    checkpoint: Checkpoint, tmp_path: Path, max_shard_bytes: int
) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    write_hf(
        first,
        through_megatron(checkpoint, checkpoint.folder),
        source=checkpoint.folder,
        max_shard_bytes=max_shard_bytes,
    )
    write_hf(second, through_megatron(checkpoint, first), source=first)
    assert (SINGLE in names(first)) == (max_shard_bytes == 10**9)
    assert same(content(first), checkpoint.tensors())
    assert same(content(second), checkpoint.tensors())
    assert (second / "config.json").read_bytes() == (checkpoint.folder / "config.json").read_bytes()
    assert names(tmp_path) == {"first", "second"}


def test_transformers_loads_what_was_written(sharded: Path, checkpoints: Checkpoints) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(sharded)
    assert same(dict(model.state_dict()), checkpoints["qwen2-untied"].tensors())


def test_the_index_places_every_tensor_in_a_file_of_bounded_size(sharded: Path) -> None:
    index = json.loads((sharded / INDEX).read_text())
    tensors = content(sharded)
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in tensors.values())
    for file in set(index["weight_map"].values()):
        with safe_open(sharded / file, "pt") as shard:
            held = set(shard.keys())
        assert held == {n for n, f in index["weight_map"].items() if f == file}
        assert sum(tensors[name].nbytes for name in held) <= 30_000


def test_a_tensor_larger_than_the_bound_has_a_file_of_its_own(tmp_path: Path, single: Path) -> None:
    tensors = {"a": torch.ones(4), "b": torch.ones(100), "c": torch.ones(4)}
    write_hf(tmp_path / "out", tensors.items(), source=single, max_shard_bytes=100)
    assert same(content(tmp_path / "out"), tensors)


def test_mixed_dtypes_and_odd_sizes_stay_readable(tmp_path: Path, single: Path) -> None:
    tensors = {
        "a": torch.ones(3, dtype=torch.bfloat16),
        "b": torch.ones(2, 1),
        "c": torch.tensor(2.0),
        "d": torch.arange(6.0).reshape(2, 3).T,
    }
    write_hf(tmp_path / "out", tensors.items(), source=single)
    assert same(content(tmp_path / "out"), tensors)
    reader = HFReader(tmp_path / "out")
    assert same({name: reader.get(name) for name in reader}, tensors)


def test_more_tensors_than_a_header_holds_go_to_the_next_file(tmp_path: Path, single: Path) -> None:
    tensors = {f"{'x' * 1000}.{i}": torch.full((2,), float(i)) for i in range(300)}
    write_hf(tmp_path / "out", tensors.items(), source=single)
    assert len(list((tmp_path / "out").glob("*.safetensors"))) == 2
    assert same(content(tmp_path / "out"), tensors)


def test_tokenizer_template_and_generation_config_go_along(tmp_path: Path, single: Path) -> None:
    carried = {
        "tokenizer.json",
        "tokenizer_config.json",
        "vocab.json",
        "merges.txt",
        "chat_template.jinja",
        "LICENSE",
    }
    for name in carried | {"README.md", "optimizer.pt"}:
        (single / name).write_text(name)
    write_hf(tmp_path / "out", [("a", torch.ones(2))], source=single)
    assert names(tmp_path / "out") == carried | {"config.json", "generation_config.json", SINGLE}
    assert (tmp_path / "out" / "merges.txt").read_text() == "merges.txt"


def test_a_new_dtype_is_written_and_said(tmp_path: Path, single: Path) -> None:
    write_hf(tmp_path / "out", [("a", torch.ones(2))], source=single, dtype=torch.bfloat16)
    assert content(tmp_path / "out")["a"].dtype == torch.bfloat16
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"
    old = json.loads((single / "config.json").read_text())
    (single / "config.json").write_text(json.dumps({**old, "torch_dtype": old.pop("dtype")}))
    write_hf(tmp_path / "old", [("a", torch.ones(2))], source=single, dtype=torch.bfloat16)
    assert json.loads((tmp_path / "old" / "config.json").read_text())["torch_dtype"] == "bfloat16"


def test_a_new_dtype_is_said_in_every_spelling_that_the_file_has(
    tmp_path: Path, single: Path
) -> None:
    old = json.loads((single / "config.json").read_text())
    (single / "config.json").write_text(json.dumps({**old, "torch_dtype": old["dtype"]}))
    write_hf(tmp_path / "out", [("a", torch.ones(2))], source=single, dtype=torch.bfloat16)
    new = json.loads((tmp_path / "out" / "config.json").read_text())
    assert new == {**old, "torch_dtype": "bfloat16", "dtype": "bfloat16"}


def test_opening_reads_no_data(single: Path) -> None:
    file = single / SINGLE
    expected = {name: tuple(t.shape) for name, t in load_file(file).items()}
    reader = HFReader(single)
    file.unlink()
    assert {name: entry.shape for name, entry in reader.entries.items()} == expected


def test_a_tied_checkpoint_may_hold_its_head_twice(single: Path) -> None:
    config = json.loads((single / "config.json").read_text())
    family, tensors = family_of(config), load_file(single / SINGLE)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, single / SINGLE)
    HFReader(single).check(family.params(config), family.copies(config))
    tensors["lm_head.weight"][0, 0] += 1
    save_file(tensors, single / SINGLE)
    with pytest.raises(UserError, match="lm_head.weight in .* differs .* tie_word_embeddings"):
        HFReader(single).check(family.params(config), family.copies(config))


def test_the_same_tensors_need_the_room_that_the_first_file_of_them_has_shown(tmp_path: Path):
    tensors = [("a" * length, torch.full((length, 3), 1.5)) for length in range(1, 9)]
    room = write_single(tmp_path, tensors)
    assert (tmp_path / SINGLE).stat().st_size > SINGLE_HEADER_BYTES
    assert write_single(tmp_path, tensors, room) == room
    assert (tmp_path / SINGLE).stat().st_size < 1000 + 36 * 12
    assert same(load_file(tmp_path / SINGLE), dict(tensors))
    with pytest.raises(UserError, match="no room for tensor c"):
        write_single(tmp_path, [*tensors, ("c", torch.ones(1))], room)


def test_weight_sync_replaces_one_file_at_once(tmp_path: Path) -> None:
    write_single(tmp_path, [("a", torch.zeros(3))])
    with safe_open(tmp_path / SINGLE, "pt") as reader:

        def second() -> Iterator[tuple[str, Tensor]]:
            yield "a", torch.ones(3)
            assert not load_file(tmp_path / SINGLE)["a"].any()
            yield "b", torch.ones(2, 2, dtype=torch.bfloat16)

        write_single(tmp_path, second())
        assert not reader.get_tensor("a").any()
    assert same(
        load_file(tmp_path / SINGLE),
        {"a": torch.ones(3), "b": torch.ones(2, 2, dtype=torch.bfloat16)},
    )
    assert names(tmp_path) == {SINGLE}


MEMORY = """
import re, sys
from pathlib import Path
from megatron_gpc.weights import SINGLE_HEADER_BYTES, HFReader, write_hf
status = Path("/proc/self/status")
kib = lambda: int(re.search(r"VmHWM:\\s+(\\d+) kB", status.read_text())[1])
before, reader = kib(), HFReader(Path(sys.argv[1]))
write_hf(Path(sys.argv[2]), ((name, reader.get(name)) for name in reader), source=Path(sys.argv[1]))
print((kib() - before) * 1024)
"""  # VmHWM and not getrusage's, which a child inherits from the process that started it


@pytest.mark.slow
def test_memory_is_that_of_one_tensor(tmp_path: Path, single: Path) -> None:
    size = 2**25
    tensors = ((f"{i}", torch.zeros(size // 4)) for i in range(8))
    write_hf(tmp_path / "large", tensors, source=single)
    done = subprocess.run(
        [sys.executable, "-c", MEMORY, str(tmp_path / "large"), str(tmp_path / "out")],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert (tmp_path / "out" / SINGLE).stat().st_size > 8 * size
    assert int(done.stdout) < 2 * size + 2**24  # one tensor, and the next before it is let go
