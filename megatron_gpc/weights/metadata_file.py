"""Reads `.metadata`, the pickle that describes a distributed checkpoint, without its powers.

torch and megatron-core unpickle it as it is, so whoever wrote it could run any code.  What passes
here has only the classes of a description, and sets attributes of their instances alone: to let
torch read it after that is safe.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from megatron_gpc.errors import UserError
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
