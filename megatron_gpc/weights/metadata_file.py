"""Reads `.metadata`, the pickle that describes a distributed checkpoint, without its powers.

torch and megatron-core unpickle it as it is, so whoever wrote it could run any code.  What passes
here has only the classes of a description, and sets attributes of their instances alone: to let
torch read it after that is safe.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    TensorStorageMetadata,
)

from megatron_gpc.errors import UserError
from megatron_gpc.run.files import open_regular
from megatron_gpc.weights.unpickler import RestrictedUnpickler

_DCP = "torch.distributed.checkpoint."
_ALLOWED = {
    _DCP + "metadata": {
        *("BytesStorageMetadata", "ChunkStorageMetadata", "Metadata", "MetadataIndex"),
        *("StorageMeta", "TensorProperties", "TensorStorageMetadata", "_MEM_FORMAT_ENCODING"),
    },
    _DCP + "filesystem": {"_StorageInfo"},
    _DCP + "planner": {
        *("BytesIOWriteData", "SavePlan", "TensorWriteData", "WriteItem", "WriteItemType"),
    },
    "megatron.core.dist_checkpointing.strategies.torch": {"MCoreSavePlan"},
    "pathlib": {"Path", "PosixPath", "PurePosixPath"},
    "pathlib._local": {"Path", "PosixPath", "PurePosixPath"},
    "collections": {"OrderedDict"},
    "builtins": {"set", "frozenset", "slice", "complex"},
    "torch.serialization": {"_get_layout"},
    "torch": {"Size", "device"},
}


class _DescriptionUnpickler(RestrictedUnpickler):
    allowed = _ALLOWED

    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        return super().find_class(module, name)


def _problem(found: Any) -> str:
    """Why readers cannot go by a description; empty if they can."""
    if not isinstance(found, Metadata):
        return f"a {type(found).__name__}"
    if not isinstance(found.state_dict_metadata, dict) or not isinstance(found.storage_data, dict):
        return "it does not say what lies where"
    for key, tensor in found.state_dict_metadata.items():
        if not isinstance(key, str) or not _can_be(tensor):
            return f"{key!r:.80} cannot be"
    for index, place in found.storage_data.items():
        numbers = getattr(place, "offset", None), getattr(place, "length", None)
        name = getattr(place, "relative_path", None)
        beside = isinstance(name, str) and name and Path(name).name == name
        if not beside or not _are_sizes(numbers):
            return f"{index!r:.80} lies in {name!r:.80} at {numbers!r:.80}"
    return ""


def _can_be(tensor: Any) -> bool:
    if not isinstance(tensor, TensorStorageMetadata):
        return isinstance(tensor, BytesStorageMetadata)
    size = tensor.size
    dtype = getattr(tensor.properties, "dtype", None)
    return (
        isinstance(dtype, torch.dtype)
        and _are_sizes(size)
        and isinstance(tensor.chunks, list)
        and all(
            isinstance(chunk, ChunkStorageMetadata)
            and _are_sizes(chunk.offsets)
            and _are_sizes(chunk.sizes)
            and len(chunk.offsets) == len(chunk.sizes) == len(size)
            for chunk in tensor.chunks
        )
    )


def _are_sizes(found: Any) -> bool:
    numbers = isinstance(found, tuple | list) and all(type(n) is int for n in found)
    return numbers and all(0 <= n < 2**62 for n in found)


def read_metadata(file: Path) -> Any:
    """What is pickled in it.

    Raises:
        UserError: it is absent, damaged, or has what no description has.
    """
    try:
        with open_regular(file) as stream:
            found = _DescriptionUnpickler(stream).load()
        if problem := _problem(found):
            raise ValueError(problem)
        return found
    except FileNotFoundError:
        raise UserError(f"{file} is absent: the checkpoint is not complete") from None
    except RecursionError:
        raise UserError(f"{file}: not a checkpoint's description: too deep") from None
    except Exception as error:  # a damaged pickle can raise anything
        reason = (str(error).splitlines() or [""])[0][:300]
        raise UserError(
            f"{file}: not a checkpoint's description ({type(error).__name__}: {reason})"
        ) from None
