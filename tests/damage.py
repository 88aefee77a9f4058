"""Ways in which a Hugging Face checkpoint can be damaged, and what is said about each."""

from __future__ import annotations

import json
import resource
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from megatron_gpc.weights.hf_files import INDEX, SINGLE


def rewrite_index(folder: Path, change: Callable[[dict[str, str]], None]) -> None:
    index = json.loads((folder / INDEX).read_text())
    change(index["weight_map"])
    (folder / INDEX).write_text(json.dumps(index))


def rewrite_tensors(folder: Path, change: Callable[[dict[str, Tensor]], None]) -> None:
    tensors = load_file(folder / SINGLE)
    change(tensors)
    save_file(tensors, folder / SINGLE)


def cut(file: Path, size: int) -> None:
    file.write_bytes(file.read_bytes()[:size])


def first_file(folder: Path) -> Path:
    return min(folder.glob("*.safetensors"))


@contextmanager
def small_disk(size: int) -> Iterator[None]:
    """Files cannot grow beyond `size` bytes: the kernel refuses the write, as it does on a full
    disk.  Around what is tested and no more: a log that pytest writes may be larger.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


SHARD_1 = "model-00001-of-00004.safetensors"
DAMAGE: dict[str, tuple[str, Callable[[Path], object], str]] = {
    # name: the fixture that is damaged ("single" or "sharded"), how, and what the message says
    "no weights": (
        "single",
        lambda f: (f / SINGLE).unlink(),
        "has neither model.safetensors nor model.safetensors.index.json",
    ),
    "two generations of weights": (
        "sharded",
        lambda f: shutil.copy(first_file(f), f / SINGLE),
        "remove the stale one",
    ),
    "index is no JSON": ("sharded", lambda f: (f / INDEX).write_text("{"), "not an index"),
    "index without map": ("sharded", lambda f: (f / INDEX).write_text("{}"), "not an index"),
    "index with an empty map": (
        "sharded",
        lambda f: (f / INDEX).write_text('{"weight_map": {}}'),
        "weight_map must be a mapping",
    ),
    "index points outside": (
        "sharded",
        lambda f: rewrite_index(f, lambda m: m.update({"model.norm.weight": "../x"})),
        "tensor model.norm.weight: '../x' is not the name of a file beside it",
    ),
    "a shard is absent": (
        "sharded",
        lambda f: first_file(f).unlink(),
        "index.json names model-00001-of-00004.safetensors (for ",
    ),
    "index places a tensor wrongly": (
        "sharded",
        lambda f: rewrite_index(f, lambda m: m.update({"nowhere": SHARD_1})),
        "says that model-00001-of-00004.safetensors holds nowhere, which it does not",
    ),
    "index forgets a tensor": (
        "sharded",
        lambda f: rewrite_index(f, lambda m: m.pop("model.norm.weight")),
        "holds model.norm.weight, which model.safetensors.index.json does not place there",
    ),
    "truncated file": ("single", lambda f: cut(f / SINGLE, 20_000), "truncated"),
    "truncated shard": ("sharded", lambda f: cut(first_file(f), 270_000), "00001-of-00004"),
    "truncated header": ("single", lambda f: cut(f / SINGLE, 100), "truncated"),
    "empty file": ("single", lambda f: cut(f / SINGLE, 0), "truncated"),
    "a web page instead": (
        "single",
        lambda f: (f / SINGLE).write_text("<html>" * 99),
        "not a safetensors file",
    ),
    "integer weights": (
        "single",
        lambda f: rewrite_tensors(
            f, lambda t: t.update({"model.norm.weight": torch.ones(32, dtype=torch.int32)})
        ),
        "model.norm.weight in",
    ),
    "8-bit weights": (
        "single",
        lambda f: rewrite_tensors(
            f, lambda t: t.update({"model.norm.weight": torch.ones(32).to(torch.float8_e4m3fn)})
        ),
        "is F8_E4M3; only F32, BF16, F16 are supported",
    ),
    "missing tensor": (
        "single",
        lambda f: rewrite_tensors(f, lambda t: t.pop("model.layers.1.self_attn.k_proj.bias")),
        "lacks model.layers.1.self_attn.k_proj.bias (for decoder.layers.1.self_attention",
    ),
    "missing layer": (
        "single",
        lambda f: rewrite_tensors(
            f, lambda t: [t.pop(name) for name in list(t) if ".layers.1." in name]
        ),
        "and 9 more",
    ),
    "surplus tensor": (
        "single",
        lambda f: rewrite_tensors(f, lambda t: t.update({"score.weight": torch.ones(1)})),
        "leaves no place for: score.weight in model.safetensors",
    ),
    "misshapen tensor": (
        "single",
        lambda f: rewrite_tensors(f, lambda t: t.update({"model.norm.weight": torch.ones(33)})),
        "has shape [33], but config.json says [32]",
    ),
    "transposed tensor": (
        "single",
        lambda f: rewrite_tensors(
            f, lambda t: t.update({"model.layers.0.mlp.down_proj.weight": torch.ones(48, 32)})
        ),
        "model.layers.0.mlp.down_proj.weight in",
    ),
    "a file that cannot be opened": (
        "single",
        lambda f: ((f / SINGLE).unlink(), (f / SINGLE).mkdir()),
        "is a folder; name a file",
    ),
}
