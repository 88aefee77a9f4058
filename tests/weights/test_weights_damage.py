"""Damaged checkpoints and failed writes: a message that names tensor and file, nothing left."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from damage import DAMAGE, cut, small_disk
from safetensors.torch import load_file
from tiny_models import names
from torch import Tensor

from megatron_gpc.errors import UserError
from megatron_gpc.weights import HFReader, family_of, write_hf, write_single
from megatron_gpc.weights.hf_files import SINGLE


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_named(damage: str, request: pytest.FixtureRequest) -> None:
    fixture, inflict, says = DAMAGE[damage]
    folder = request.getfixturevalue(fixture)
    config = json.loads((folder / "config.json").read_text())
    HFReader(folder).check(family_of(config).params(config))  # whole before
    inflict(folder)
    with pytest.raises(UserError) as refusal:
        HFReader(folder).check(family_of(config).params(config))
    assert says in str(refusal.value)
    assert str(folder) in str(refusal.value)


def test_a_file_that_shrinks_while_it_is_read_is_named(single: Path) -> None:
    reader = HFReader(single)
    last = max(reader.entries, key=lambda name: reader.entries[name].offset)
    cut(single / SINGLE, (single / SINGLE).stat().st_size - 4)
    with pytest.raises(UserError, match=f"ends inside tensor {last}"):
        reader.get(last)
    (single / SINGLE).unlink()
    with pytest.raises(UserError, match=f"cannot read tensor {last}: No such file"):
        reader.get(last)
    with pytest.raises(UserError, match="has no tensor nowhere"):
        reader.get("nowhere")


# Trouble while writing: a clear word, and nothing left behind


def broken() -> Iterator[tuple[str, Tensor]]:
    yield "a", torch.ones(100)
    raise KeyboardInterrupt


def test_an_interrupted_checkpoint_leaves_nothing_behind(single: Path) -> None:
    before = names(single.parent)

    def looked_at() -> Iterator[tuple[str, Tensor]]:
        yield "a", torch.ones(100)
        assert not (single.parent / "out").exists()  # nobody can take half of it for the whole
        yield from broken()

    with pytest.raises(UserError, match="tensor a comes twice"):
        write_hf(single.parent / "out", looked_at(), source=single)
    with pytest.raises(KeyboardInterrupt):
        write_hf(single.parent / "out", broken(), source=single)
    assert names(single.parent) == before


def test_an_interrupted_weight_sync_keeps_the_old_file(tmp_path: Path) -> None:
    write_single(tmp_path, [("a", torch.zeros(3))])
    with pytest.raises(KeyboardInterrupt):
        write_single(tmp_path, broken())
    assert names(tmp_path) == {SINGLE}
    assert not load_file(tmp_path / SINGLE)["a"].any()


def test_a_full_disk_is_named_with_tensor_and_file_and_leaves_nothing_behind(single: Path) -> None:
    before = names(single.parent)
    tensors = [("small", torch.ones(10)), ("large", torch.ones(100_000))]
    says = r"out.*partial: cannot write tensor large: File too large"
    with small_disk(300_000), pytest.raises(UserError, match=says):
        write_hf(single.parent / "out", tensors, source=single)
    assert names(single.parent) == before
    says = "model.safetensors: cannot be written: File too large"
    with small_disk(300_000), pytest.raises(UserError, match=says):
        write_single(single, tensors)
    assert names(single) == {SINGLE, "config.json", "generation_config.json"}


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda f: write_hf(f, [("a", torch.ones(1))], source=f), "is not an empty folder"),
        (
            lambda f: write_hf(f / SINGLE, [("a", torch.ones(1))], source=f),
            "is not an empty folder",
        ),
        (
            lambda f: write_hf(f / "out", [("a", torch.ones(1))], source=f.parent),
            "has no config.json",
        ),
        (lambda f: write_hf(f / "out", [], source=f), "no tensors to write"),
        (
            lambda f: write_hf(f / "out", [("a", torch.ones(1).double())], source=f),
            "a is torch.float64; a checkpoint holds float32, bfloat16, float16",
        ),
        (
            lambda f: write_hf(f / SINGLE / "out", [("a", torch.ones(1))], source=f),
            "cannot be written: ",
        ),
        (
            lambda f: write_single(f / "absent", [("a", torch.ones(1))]),
            "cannot be written: No such file or directory",
        ),
    ],
)
def test_what_cannot_be_written_is_said(
    make: Callable[[Path], None], says: str, single: Path
) -> None:
    before = names(single), names(single.parent)
    with pytest.raises(UserError) as refusal:
        make(single)
    assert says in str(refusal.value)
    assert (names(single), names(single.parent)) == before
