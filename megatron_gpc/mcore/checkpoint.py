"""Checkpoints: megatron-core's distributed format, complete or absent, for any layout."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from torch.distributed.checkpoint import CheckpointException

from megatron_gpc.config import Config
from megatron_gpc.errors import UserError
from megatron_gpc.mcore.model import PolicyModel
from megatron_gpc.mcore.policy import Policy
from megatron_gpc.types import TrainState
from megatron_gpc.weights import MegatronReader, Place

PREFIX = "step_"
_UNREADABLE = (
    *(OSError, RuntimeError, dist_checkpointing.core.CheckpointingException),
    CheckpointException,  # a BaseException, in which torch wraps what any rank met
)


def checkpoints(run_dir: Path) -> list[Path]:
    """Complete checkpoints of a run, oldest first.

    A folder is complete once it carries its final name: it is written under another and renamed.
    """
    found = [
        f for f in (run_dir / "checkpoints").glob(PREFIX + "*") if f.name[len(PREFIX) :].isdigit()
    ]
    return sorted(found, key=lambda f: int(f.name[len(PREFIX) :]))


def save(config: Config, policy: Policy, state: TrainState) -> Path:
    """Write a checkpoint and remove older ones beyond checkpoint.keep; every rank enters.

    Saved: model, optimizer, learning-rate schedule, TrainState, random generators of every rank.
    """
    final = config.run_dir / "checkpoints" / f"{PREFIX}{state.step:06d}"
    part = final.with_name(final.name + ".part")
    if dist.get_rank() == 0:
        for old in (part, final):  # leftovers of a run that was killed, or that was started over
            shutil.rmtree(old, ignore_errors=True)
        part.mkdir(parents=True)
    rng: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(rng, _rng_state())
    content = _sharded_state(policy, loading=False) | {
        "train_state": dataclasses.asdict(state),
        "scheduler": policy.scheduler.state_dict(),
        "rng": rng,
    }
    dist.barrier()
    dist_checkpointing.save(content, str(part), validate_access_integrity=False)
    dist.barrier()
    if dist.get_rank() == 0:
        part.rename(final)
        for old in checkpoints(config.run_dir)[: -config.checkpoint.keep]:
            shutil.rmtree(old)
    dist.barrier()
    return final


def load(folder: Path, policy: Policy) -> TrainState:
    """Take over a checkpoint, at whatever layout this run has; every rank enters.

    Random generators are taken over where the number of ranks is the same; at another layout they
    keep their seeds (nothing in the policy draws from them while dropout is 0).

    Raises:
        UserError: the checkpoint cannot be read.
    """
    try:
        content = dist_checkpointing.load(_sharded_state(policy, loading=True), str(folder))
    except _UNREADABLE as error:
        raise UserError(
            f"{folder}: cannot load this checkpoint: {_reason(error)}; remove it to continue "
            "from an older one"
        ) from error
    for name, model in zip(_names(policy.models), policy.models, strict=True):
        model.load_state_dict(content[name])
    policy.optimizer.load_state_dict(content["optimizer"])
    policy.scheduler.load_state_dict(content["scheduler"])
    if len(content["rng"]) == dist.get_world_size():
        _set_rng_state(content["rng"][dist.get_rank()])
    return TrainState(**content["train_state"])


def load_weights(folder: Path, models: Sequence[PolicyModel], places: Sequence[Place]) -> None:
    """Fill the policy from a converted or a saved checkpoint, at whatever layout; all ranks enter.

    Args:
        places: `weights.places_of` of the model, to which the checkpoint is held first.

    Raises:
        UserError: the checkpoint is damaged, or is not of that model.
    """
    MegatronReader(folder).check(places)
    wanted = {
        name: {  # transformer-engine's fp8 scales are not weights, and converted ones lack them
            key: value
            for key, value in model.sharded_state_dict(metadata=_metadata()).items()
            if not key.endswith("_extra_state")
        }
        for name, model in zip(_names(models), models, strict=True)
    }
    try:
        content = dist_checkpointing.load(wanted, str(folder))
    except _UNREADABLE as error:
        raise UserError(f"{folder}: cannot load this checkpoint: {_reason(error)}") from error
    for name, model in zip(_names(models), models, strict=True):
        wrong = model.load_state_dict(content[name], strict=False)
        left = [key for key in wrong.missing_keys if not key.endswith("_extra_state")]
        assert not left and not wrong.unexpected_keys, (left, wrong.unexpected_keys)


def _reason(error: BaseException) -> str:
    """What went wrong, without the traceback that torch's exception is full of."""
    if isinstance(error, CheckpointException):
        error, _ = next(iter(error.failures.values()))
    return f"{type(error).__name__}: {error}"


def _names(models: Sequence[PolicyModel]) -> list[str]:
    return ["model"] if len(models) == 1 else [f"model{i}" for i in range(len(models))]


def _metadata() -> dict[str, Any]:
    return {
        "distrib_optim_sharding_type": "fully_reshardable",
        "dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True),
    }


def _sharded_state(policy: Policy, loading: bool) -> dict[str, Any]:
    metadata = _metadata()
    state: dict[str, Any] = {
        name: model.sharded_state_dict(metadata=metadata)
        for name, model in zip(_names(policy.models), policy.models, strict=True)
    }
    state["optimizer"] = policy.optimizer.sharded_state_dict(
        dict(state), is_loading=loading, metadata=metadata
    )
    return state


def _rng_state() -> dict[str, Any]:
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
        "tracker": get_cuda_rng_tracker().get_states(),
    }


def _set_rng_state(state: dict[str, Any]) -> None:
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
    get_cuda_rng_tracker().set_states(state["tracker"])
