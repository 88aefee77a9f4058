"""What a checkpoint holds, and how it is taken over at whatever layout."""

from __future__ import annotations

import dataclasses
import pickle
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.dict_utils import dict_list_map_inplace
from megatron.core.dist_checkpointing.mapping import LocalNonpersistentObject, ShardedBase
from megatron.core.optimizer import ChainedOptimizer
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from torch.distributed.checkpoint import CheckpointException

from megatron_gpc.config import Config
from megatron_gpc.errors import UserError
from megatron_gpc.mcore.model import PolicyModel
from megatron_gpc.mcore.policy import Policy
from megatron_gpc.mcore.setup import is_main, seed_generators
from megatron_gpc.types import TrainState
from megatron_gpc.weights import Place
from megatron_gpc.weights.common_file import read_common
from megatron_gpc.weights.megatron_files import MegatronReader
from megatron_gpc.weights.metadata_file import read_metadata

_LOAD_ERRORS = (
    *(OSError, RuntimeError, dist_checkpointing.core.CheckpointingException),
    *(pickle.UnpicklingError, EOFError, ValueError, AssertionError, AttributeError),
    *(ImportError, LookupError, TypeError),  # of files that are well-formed, and something else
    CheckpointException,  # a BaseException, in which torch wraps what any rank met
)


def content(config: Config, policy: Policy, state: TrainState) -> dict[str, Any]:
    """All that a run needs to go on as if nothing had happened; every rank enters.

    Model and optimizer, under names and shapes that do not depend on the layout; the number of
    updates, from which learning rate and Adam's step follow; TrainState; random generators of every
    rank.
    """
    generators: list[Any] | None = [None] * dist.get_world_size() if is_main() else None
    dist.gather_object(generator_states(), generators)
    _complete_optimizer(policy.optimizer)
    return _sharded_state(policy, loading=False) | {
        "train_state": dataclasses.asdict(state),
        "updates": policy.scheduler.num_steps,
        "layout": _layout(config),
        "generators": generators,
    }


def take_over(config: Config, policy: Policy, folder: Path) -> TrainState:
    """Load a checkpoint into a policy that has not been trained yet; every rank enters.

    Raises:
        UserError: it is not of this model, or not of this optimizer.
    """
    common = read_common(folder)
    wanted = _sharded_state(policy, loading=True)
    keys = set(wanted["optimizer"])
    loaded = _load(
        wanted,
        folder,
        "; a checkpoint resumes at any parallel.* of the same model with the same "
        "optim.distributed and model.dtype; set them back, or start over with resume=none",
    )
    for name, model in zip(_names(policy.models), policy.models, strict=True):
        if not config.megatron.transformer.get("fp8"):
            _refuse_pickles(loaded[name], folder)
        model.load_state_dict(loaded[name])
    # Experts have an optimizer of their own from ep 2 on, so the folder's skeleton of this dict may
    # be another; all that counts is asked for by name.
    mine = {key: loaded["optimizer"][key] for key in keys}
    _load_optimizer(policy.optimizer, mine, common["updates"])
    policy.scheduler.step(increment=common["updates"])
    state = TrainState(**common["train_state"])
    if common["layout"] == _layout(config):
        set_generator_states(common["generators"][dist.get_rank()])
    else:
        # Not the seed that the run started with, or its first draws would be repeated.
        seed_generators(config.seed + 1_000_003 * state.step)
    return state


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
    loaded = _load(wanted, folder)
    for name, model in zip(_names(models), models, strict=True):
        wrong = model.load_state_dict(loaded[name], strict=False)
        left = [key for key in wrong.missing_keys if not key.endswith("_extra_state")]
        assert not left and not wrong.unexpected_keys, (left, wrong.unexpected_keys)


def _load(wanted: dict[str, Any], folder: Path, way_out: str = "") -> dict[str, Any]:
    read_metadata(folder / ".metadata")  # megatron-core unpickles whatever it finds there
    try:
        loaded: Any = dist_checkpointing.load(wanted, str(folder))
        return loaded
    except _LOAD_ERRORS as error:
        raise UserError(
            f"{folder}: cannot load this checkpoint: {_reason(error)}{way_out}"
        ) from error


def _refuse_pickles(state: Mapping[str, Any], folder: Path) -> None:
    """transformer-engine unpickles its fp8 scales, bytes in a tensor that is empty without fp8."""
    for key, value in state.items():
        if key.endswith("_extra_state") and isinstance(value, torch.Tensor) and value.numel():
            raise UserError(
                f"{folder}: {key} is not empty, as if the run computed in fp8; set "
                "megatron.transformer.fp8 if it did, and do not resume from it otherwise"
            )


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
        # The optimizer of experts, which exists from ep 2 on, saves under names of its own unless
        # it is told not to; with plain names any ep loads them.
        "chained_optim_avoid_prefix": True,
        "dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True),
    }


def _sharded_state(policy: Policy, loading: bool) -> dict[str, Any]:
    metadata = _metadata()
    state: dict[str, Any] = {
        name: model.sharded_state_dict(metadata=metadata)
        for name, model in zip(_names(policy.models), policy.models, strict=True)
    }
    # Only tensors of the optimizer are saved.  The rest (settings of its parameter groups) is this
    # run's configuration, and would be rank 0's, which at another layout has other groups.
    state["optimizer"] = dict_list_map_inplace(
        _local_unless_sharded,
        policy.optimizer.sharded_state_dict(dict(state), is_loading=loading, metadata=metadata),
    )
    return state


def _local_unless_sharded(value: Any) -> Any:
    saved = isinstance(value, ShardedBase | LocalNonpersistentObject)
    return value if saved else LocalNonpersistentObject(value)


def _complete_optimizer(optimizer: ChainedOptimizer) -> None:
    """Give Adam the moments, 0, that it otherwise makes in its first step: every step so far may
    have been without an update."""
    for one in optimizer.chained_optimizers:
        one.init_state_fn(one.optimizer, one.config)  # adds only what is missing
        if isinstance(one.optimizer, torch.optim.Adam):
            for state in one.optimizer.state.values():
                state.setdefault("step", torch.zeros(()))


def _load_optimizer(optimizer: ChainedOptimizer, state: dict[Any, Any], updates: int) -> None:
    """Load the state and the number of updates, on which Adam's bias correction depends."""
    chained = optimizer.chained_optimizers
    for number, one in enumerate(chained):
        part = state if len(chained) == 1 else state[number]
        adam = part.get("optimizer", part)
        for group in adam["param_groups"]:
            group["step"] = updates
        if isinstance(one.optimizer, torch.optim.Adam):  # counts a parameter, not a group
            for one_parameter in adam.get("state", {}).values():
                one_parameter["step"] = torch.tensor(float(updates))
        one.load_state_dict(part)


def _layout(config: Config) -> dict[str, Any]:
    """The layout: with another one, a rank cannot take over the generator of the same number."""
    return dataclasses.asdict(config.parallel) | {"dp": None, "ranks": dist.get_world_size()}


def generator_states() -> dict[str, Any]:
    """Every random generator of this rank, as types that torch loads without pickle's powers."""
    numpy_state = np.random.get_state(legacy=False)
    numpy_state["state"]["key"] = numpy_state["state"]["key"].tolist()
    return {
        "python": random.getstate(),
        "numpy": numpy_state,
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
        "tracker": _tracker().get_states(),
    }


def _tracker() -> Any:
    """megatron-core's generators of tensor-parallel ranks; setup has made them."""
    return get_cuda_rng_tracker()


def set_generator_states(states: dict[str, Any]) -> None:
    """Restore what `generator_states` returned; a GPU's generator only if there is a GPU."""
    random.setstate(states["python"])
    np.random.set_state(states["numpy"])
    torch.set_rng_state(states["torch"])
    if states["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])
    _tracker().set_states(states["tracker"])
