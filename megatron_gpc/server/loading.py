"""Weights of the embedded generator: from a folder, or as tensors out of a request.

Both ways end with all of the new weights in a model or in an error that names the tensor; the model
that was there before is then as it was.
"""

from __future__ import annotations

import base64
import io
import json
import os
import pickle
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion
from transformers.utils import logging as transformers_logging

from megatron_gpc.errors import UserError
from megatron_gpc.run.files import check_regular
from megatron_gpc.weights.families import FAMILIES
from megatron_gpc.weights.fields import refuse_two_spellings
from megatron_gpc.weights.hf_files import HFReader
from megatron_gpc.weights.unpickler import RestrictedUnpickler

ATTENTION_KINDS = {"full_attention", "sliding_attention"}
"""Layers whose state is keys and values; the generator's cache has no other kind."""
_FILE_ERRORS = (
    *(OSError, ValueError, RuntimeError, TypeError, AttributeError, LookupError, MemoryError),
    *(pickle.UnpicklingError, EOFError, OverflowError),
)
"""What Python, torch and transformers raise on content that others have made."""


def load_folder(
    folder: Path, dtype: str | torch.dtype, config: PretrainedConfig | None = None
) -> PreTrainedModel:
    """The model of a Hugging Face folder, ready for inference.

    Args:
        folder: config.json and weights; with `config` given, only the weights are read.
        dtype: of the weights in memory; "auto" takes config.json's.
        config: of the model that these weights must fit.

    Raises:
        UserError: no such folder, unreadable files, or tensors that are missing, unknown or of the
            wrong shape.
    """
    if not os.path.isdir(folder):  # Path.is_dir raises if the name is too long
        raise UserError(
            f"{folder}: no such folder; give a Hugging Face checkpoint folder "
            "(config.json, safetensors)"
        )
    for file in folder.glob("*.json"):
        check_regular(file)
    HFReader(folder)  # what it refuses, transformers would wait for, follow or unpickle
    if config is None:
        _refuse_two_spellings(folder)
    model = _load(AutoModelForCausalLM, str(folder), str(folder), dtype=dtype, config=config)
    for tensor in [*model.parameters(), *model.buffers()]:
        # They are views of the mapped file, and whoever rewrites it must not change the model.
        tensor.data = tensor.data.clone()
    return model


def reloaded(model: PreTrainedModel, folder: Path) -> PreTrainedModel:
    """The model with the weights of another folder: the same object if it keeps its tensors as the
    folder has them, else what `load_folder` makes, which takes ten times as long.

    Raises:
        UserError: as `load_folder`; or a weight is not finite.
    """
    if os.path.isdir(folder) and _as_in_checkpoints(model):
        reader, needed = HFReader(folder), model.state_dict()
        shapes = {name: tuple(tensor.shape) for name, tensor in needed.items()}
        for tied in model.all_tied_weights_keys:
            shapes.pop(tied, None)
        if shapes == {name: entry.shape for name, entry in reader.entries.items()}:
            return with_tensors(model, [(name, reader.get(name)) for name in reader])
    return load_folder(folder, model.dtype, model.config)


def _as_in_checkpoints(model: PreTrainedModel) -> bool:
    """Whether transformers keeps the tensors as checkpoints have them: experts it stacks."""
    return not getattr(model, "_weight_conversions", True)


def _refuse_two_spellings(folder: Path) -> None:
    """Refuse what the trainer refuses in config.json, if its family can be trained;
    what else is wrong with the file transformers says."""
    hf = None
    with suppress(OSError, ValueError):
        hf = json.loads((folder / "config.json").read_text())
    if isinstance(hf, dict) and hf.get("model_type") in FAMILIES:
        refuse_two_spellings(hf)


def with_tensors(model: PreTrainedModel, named: list[tuple[str, torch.Tensor]]) -> PreTrainedModel:
    """The model with some of its weights replaced: the same object if it keeps its tensors as
    checkpoints have them, else another that shares the other weights.

    Args:
        named: names as in the model's Hugging Face checkpoint.  Any part of the weights will do.

    Raises:
        UserError: a name that the model does not have or that comes twice, a wrong shape, or no
            floating-point numbers.
    """
    state = revert_weight_conversion(model, model.state_dict())
    names = Counter(name for name, _ in named)
    for name, tensor in named:
        if names[name] > 1:
            raise UserError(f"{name}: comes {names[name]} times")
        if not tensor.is_floating_point():
            raise UserError(f"{name}: has {tensor.dtype}; weights are floating-point numbers")
        if name not in state:
            raise UserError(f"{name}: the model has no such tensor")
        if tensor.shape != state[name].shape:
            raise UserError(
                f"{name}: has shape {list(tensor.shape)}, the model needs {list(state[name].shape)}"
            )
    new = dict(named)
    for tied, source in model.all_tied_weights_keys.items():
        # One tensor under two names.  A sender that knows only the tied name means the tensor.
        if tied in new:
            new.setdefault(source, new.pop(tied))
        state.pop(tied, None)
    if _as_in_checkpoints(model):
        for name, tensor in new.items():  # once all are known to fit
            state[name].copy_(tensor)
        return model
    return _load(
        type(model),
        "the tensors sent",
        None,
        dtype=model.dtype,
        config=model.config,
        # Clones: a model that is made anew keeps tensors, and the sender's are only lent.
        state_dict={**state, **{name: tensor.clone() for name, tensor in new.items()}},
    )


def _load(loader: Any, what: str, folder: str | None, **options: Any) -> PreTrainedModel:
    """from_pretrained, with its warnings about unfit tensors turned into errors."""
    transformers_logging.disable_progress_bar()
    if options["config"] is None:
        del options["config"]
    try:
        model, info = loader.from_pretrained(
            folder,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            local_files_only=True,
            **options,
        )
    except (*_FILE_ERRORS, SafetensorError, StrictDataclassError) as error:
        raise UserError(f"{what}: cannot be loaded: {error}") from None
    for name, found, needed in sorted(info["mismatched_keys"]):
        raise UserError(f"{what}: {name} has shape {list(found)}, the model needs {list(needed)}")
    for problem in ("missing", "unexpected"):
        names = sorted(info[f"{problem}_keys"])
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise UserError(f"{what}: {problem} tensor {names[0]}{more}")
    kinds = set(model.config.layer_types) if "layer_types" in model.config else set()
    if kinds - ATTENTION_KINDS:
        raise UserError(
            f"{what}: the embedded generator runs attention layers only, this model has "
            f"{', '.join(sorted(kinds - ATTENTION_KINDS))}; use an SGLang server"
        )
    return model.eval()


class _TensorUnpickler(RestrictedUnpickler):
    """Unpickles plain tensors only, because a pickle can otherwise run any code."""

    allowed = {
        "torch._utils": {"_rebuild_tensor_v2"},
        "torch.storage": {"_load_from_bytes"},
        "collections": {"OrderedDict"},
    }

    def find_class(self, module: str, name: str) -> Any:
        found = super().find_class(module, name)
        return _load_storage if name == "_load_from_bytes" else found


def _load_storage(content: bytes) -> Any:
    """torch.storage._load_from_bytes without its weights_only=False, and without archives: a small
    one can be unpacked to any size."""
    if content.startswith(b"PK"):
        raise pickle.UnpicklingError("a storage is no archive")
    return torch.load(io.BytesIO(content), weights_only=True, map_location="cpu")


def unpack_tensors(serialized: str, /) -> list[tuple[str, torch.Tensor]]:
    """Named tensors from base64 of `pickle.dumps([(name, tensor), ...])`.

    Raises:
        UserError: not base64, not such a pickle, or a pickle of anything but plain tensors.
    """
    try:
        content = base64.b64decode(serialized, validate=True)
        named = _TensorUnpickler(io.BytesIO(content)).load()
    except _FILE_ERRORS as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0][:300]
        raise UserError(f"serialized_named_tensors: {reason}") from None
    valid = isinstance(named, list) and all(
        isinstance(item, tuple)
        and len(item) == 2
        and isinstance(item[0], str)
        and type(item[1]) is torch.Tensor
        for item in named
    )
    if not valid:
        raise UserError("serialized_named_tensors: expected a pickled list of (name, tensor)")
    return named
