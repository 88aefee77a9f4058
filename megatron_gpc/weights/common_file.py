"""Reads `common.pt`, what of a checkpoint is not sharded; it must be what a run writes there."""

from __future__ import annotations

import random
from dataclasses import field
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from pydantic import Field, TypeAdapter, ValidationError

from megatron_gpc.config.types import section
from megatron_gpc.errors import UserError
from megatron_gpc.run.files import open_regular
from megatron_gpc.weights.folders import COMMON

_Count = Annotated[int, Field(ge=0, lt=2**53, strict=True)]


@section
class _TrainState:
    """As types.TrainState."""

    step: _Count
    sampling: dict[str, Any] = field(default_factory=dict)
    controller: dict[str, Any] = field(default_factory=dict)
    skipped: list[str] = field(default_factory=list)


@section
class _Common:
    train_state: _TrainState
    updates: _Count
    layout: dict[str, Any]
    generators: list[dict[str, Any]]
    """Of every rank."""
    optimizer: dict[Any, Any] = field(default_factory=dict)
    """Which optimizers there are, without their tensors."""


def read_common(folder: Path) -> dict[str, Any]:
    """What a run has saved beside its tensors.

    Raises:
        UserError: it is absent, damaged, or well-formed and something else.
    """
    file = folder / COMMON
    try:
        with open_regular(file) as stream:
            found: dict[str, Any] = torch.load(stream, map_location="cpu", weights_only=True)
        TypeAdapter(_Common).validate_python(found)
        if len(found["generators"]) != found["layout"].get("ranks"):
            raise ValueError("generators are not as many as the ranks of the layout")
        for states in found["generators"]:
            _try_out(states)
        return found
    except FileNotFoundError:
        raise UserError(f"{file} is absent: the checkpoint is not complete") from None
    except ValidationError as error:
        problem = error.errors()[0]
        reason = f"{'.'.join(map(str, problem['loc']))}: {problem['msg']}"
    except Exception as error:  # a damaged pickle can raise anything
        reason = f"{type(error).__name__}: {error!s:.200}"
    raise UserError(
        f"{file} is not what a run saves there ({reason}); put the run's own file back, or remove "
        f"{folder.name}, and the checkpoint before it is taken"
    )


def _try_out(states: dict[str, Any]) -> None:
    """Raises whatever setting generators to these states would, but for a GPU's."""
    random.Random().setstate(states["python"])
    np.random.RandomState().set_state(states["numpy"])
    torch.Generator().set_state(states["torch"])
    gpu = [] if states["cuda"] is None else [states["cuda"]]
    for state in (*gpu, *dict(states["tracker"]).values()):
        if not isinstance(state, torch.Tensor) or state.dtype is not torch.uint8:
            raise TypeError("a generator's state is no tensor of bytes")
