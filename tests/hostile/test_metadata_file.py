"""`.metadata` of a checkpoint is a pickle: it may describe tensors and nothing else."""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint import metadata as described
from torch.distributed.checkpoint.filesystem import _StorageInfo

from megatron_gpc.errors import UserError
from megatron_gpc.weights.metadata_file import read_metadata


def description() -> described.Metadata:
    chunk = described.ChunkStorageMetadata(torch.Size([0, 0]), torch.Size([2, 3]))
    properties = described.TensorProperties(torch.bfloat16)
    tensor = described.TensorStorageMetadata(properties, torch.Size([2, 3]), [chunk])
    index = described.MetadataIndex("w", torch.Size([0, 0]), 0)
    return described.Metadata(
        {"w": tensor}, storage_data={index: _StorageInfo("__0_0.distcp", 0, 9)}
    )


@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_a_description_is_read(tmp_path, protocol):
    file = tmp_path / ".metadata"
    file.write_bytes(pickle.dumps(description(), protocol=protocol))
    assert read_metadata(file) == description()


class Runs:
    def __init__(self, function: Any, *arguments: Any):
        self.call = (function, arguments)

    def __reduce__(self) -> Any:
        return self.call


def described_as(**changed: object) -> bytes:
    """A description whose objects are the right ones and hold something else."""
    whole = description()
    (tensor,), (place,) = whole.state_dict_metadata.values(), whole.storage_data.values()
    for name, value in changed.items():
        owner = next(o for o in (whole, tensor, tensor.chunks[0], place) if hasattr(o, name))
        setattr(owner, name, value)
    return pickle.dumps(whole)


def class_changed(module: str, name: str, attribute: str) -> bytes:
    """A pickle that sets an attribute of a class, for good."""
    slots = f"}}X\x0c\x00\x00\x00{attribute:12}K\x01s".encode()
    return b"\x80\x02" + f"c{module}\n{name}\n".encode() + b"N" + slots + b"\x86b."


@pytest.mark.parametrize(
    "content",
    [
        lambda mark: pickle.dumps(Runs(os.mkdir, str(mark))),
        lambda mark: pickle.dumps({"a": [Runs(eval, f"__import__('os').mkdir({str(mark)!r})")]}),
        lambda mark: pickle.dumps(Runs(torch.load, str(mark))),
        lambda mark: pickle.dumps(Runs(getattr, torch.Size, "count")),
        lambda mark: class_changed("torch.distributed.checkpoint.metadata", "Metadata", "spoiled"),
        lambda mark: class_changed("pathlib", "PosixPath", "spoiled"),
        lambda mark: class_changed("torch.serialization", "_get_layout", "spoiled"),
        *(
            lambda mark, name=name, value=value: described_as(**{name: value})
            for name, values in {
                "state_dict_metadata": (None, [1], {1: 2}, {"w": 5}),
                "storage_data": (None, [1], {"w": 5}),
                "size": (5, torch.Size([1]), (-1, 3), ("a", 3)),
                "properties": (None, 5),
                "chunks": (None, [1]),
                "offsets": (None, torch.Size([0]), (0, "x")),
                "relative_path": (None, 5, "../x", "/etc/passwd", ""),
                "offset": (-1, "x", 2.0, 2**70),
                "length": (-1, None),
            }.items()
            for value in values
        ),
        lambda mark: pickle.dumps(5),
        lambda mark: b"",
        lambda mark: b"\x80\x04",
        lambda mark: b"not a pickle",
        lambda mark: b"(" * 100_000,
        lambda mark: pickle.dumps(description())[:-9],
    ],
)
def test_anything_else_is_refused_and_runs_nothing(tmp_path: Path, content):
    file, mark = tmp_path / ".metadata", tmp_path / "mark"
    file.write_bytes(content(mark))
    with pytest.raises(UserError, match="not a checkpoint's description") as refused:
        read_metadata(file)
    assert "\n" not in str(refused.value) and not mark.exists()
    assert not hasattr(described.Metadata, "spoiled     ") and not hasattr(Path, "spoiled     ")
