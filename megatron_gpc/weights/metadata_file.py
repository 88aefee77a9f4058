"""Reads `.metadata`, the pickle that describes a distributed checkpoint, without its powers.

torch and megatron-core unpickle it as it is, so whoever wrote it could run any code.  What passes
here has only the classes of a description, and sets attributes of their instances alone: to let
torch read it after that is safe.
"""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import torch

from megatron_gpc.errors import UserError

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
_BUILD = pickle.BUILD[0]


_PythonUnpickler: Any = pickle._Unpickler
"""Python's own, which has one method an opcode; the one in C cannot be asked about BUILD."""


class _DescriptionUnpickler(_PythonUnpickler):
    dispatch = dict(_PythonUnpickler.dispatch)

    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        if name in _ALLOWED.get(module, ()):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"{module}.{name} is not part of a description")

    def _set_attributes(self) -> None:
        kind = type(self.stack[-2])
        if kind.__name__ not in _ALLOWED.get(kind.__module__, ()):
            raise pickle.UnpicklingError(f"it would change {kind.__module__}.{kind.__name__}")
        self.load_build()

    dispatch[_BUILD] = _set_attributes


def read_metadata(file: Path) -> Any:
    """What is pickled in it.

    Raises:
        UserError: it is absent, damaged, or has what no description has.
    """
    try:
        with file.open("rb") as stream:
            return _DescriptionUnpickler(stream).load()
    except FileNotFoundError:
        raise UserError(f"{file} is absent: the checkpoint is not complete") from None
    except RecursionError:
        raise UserError(f"{file}: not a checkpoint's description: too deep") from None
    except Exception as error:  # a damaged pickle can raise anything
        reason = (str(error).splitlines() or [""])[0][:300]
        raise UserError(
            f"{file}: not a checkpoint's description ({type(error).__name__}: {reason})"
        ) from None
