"""What the ranks of a pool do in the tests of checkpoints; every function runs on all ranks."""

from __future__ import annotations

import contextlib
import io
import os
import random
import signal
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
import torch.distributed as dist
from ranks import policy_of
from tiny import plain_streams, random_batch

from megatron_gpc.algo.clipping import affine_bounds
from megatron_gpc.batching import pack
from megatron_gpc.config import Config
from megatron_gpc.errors import UserError
from megatron_gpc.types import TrainState

BOUNDS = affine_bounds((-0.25, 0.5), (-0.13, 0.3))
STATE = TrainState(
    step=3, sampling={"source": {"cursor": 17}}, controller={"s": 0.25, "initial_entropy": 1.5}
)


def update(policy: Any, seed: int) -> tuple[float, float, float]:
    """One update; (loss, gradient norm, learning rate)."""
    from megatron_gpc.mcore.policy import UPDATE_MAXIMA, UPDATE_MEANS
    from megatron_gpc.metrics.reduce import Sums

    batch, sums = random_batch(seed=seed), Sums(UPDATE_MEANS, UPDATE_MAXIMA)
    samples = list(range(batch.num_samples))
    updated = policy.update(batch, samples, plain_streams(batch), BOUNDS, sums)
    return sums.reduce()["loss"], updated["grad_norm"], updated["learning_rate"]


def draw() -> dict[str, float]:
    """A number from every random generator of this rank."""
    from megatron.core.tensor_parallel import get_cuda_rng_tracker

    drawn = {
        "python": random.random(),
        "numpy": float(np.random.rand()),
        "torch": float(torch.rand(())),
    }
    for name in get_cuda_rng_tracker().get_states():
        with get_cuda_rng_tracker().fork(name):
            drawn[name] = float(torch.rand(()))
    return drawn


def save_and_go_on(config: Config) -> dict[str, Any]:
    """Two updates, a checkpoint, and what comes after it: two updates and random numbers.

    In the background, the process that writes is held up until the updates are done.
    """
    from megatron_gpc.mcore.checkpoint.checkpoints import Checkpoints

    with policy_of(config) as (policy, _):
        checkpoints = Checkpoints(config, policy)
        update(policy, 1)
        update(policy, 2)
        draw()  # so that the generators stand elsewhere than at a new process's second draw
        start = draw()
        checkpoints.save(STATE)
        if config.checkpoint.asynchronous:
            (writer,) = psutil.Process().children()
            writer.suspend()
        found = {"drawn": draw(), "updates": [update(policy, 3), update(policy, 4)], "start": start}
        if config.checkpoint.asynchronous:
            checkpoints.poll()
            assert not (config.run_dir / "checkpoints" / "step_000003").exists()
            writer.resume()
        checkpoints.wait()
        return found


def saved_before_any_update(config: Config) -> tuple[Any, Any, dict[str, float]]:
    """Two updates after an empty step that was saved: without a restart, and after one; and what an
    empty step says of entropy."""
    from megatron_gpc.mcore.checkpoint.checkpoints import Checkpoints
    from megatron_gpc.mcore.entropy_change import EntropyChange

    with policy_of(config) as (policy, _):
        checkpoints, empty = Checkpoints(config, policy), pack([], torch.zeros(0))
        change = EntropyChange(policy, empty, policy.score(empty)).metrics()
        checkpoints.save(STATE)
        checkpoints.wait()
        first = [update(policy, 3), update(policy, 4)]
    with policy_of(config) as (policy, _):
        assert Checkpoints(config, policy).resume() == STATE
        return first, [update(policy, 3), update(policy, 4)], change


def resume_and_go_on(config: Config) -> dict[str, Any]:
    """The same two updates and random numbers, from the newest checkpoint."""
    from megatron_gpc.mcore.checkpoint.checkpoints import Checkpoints

    with policy_of(config) as (policy, _):
        start = draw()
        said = io.StringIO()
        with contextlib.redirect_stderr(said):
            state = Checkpoints(config, policy).resume()
        found = {"drawn": draw(), "updates": [update(policy, 3), update(policy, 4)], "start": start}
        return found | {"state": state, "said": said.getvalue()}


def drawn_after_resuming(config: Config) -> dict[str, float]:
    from megatron_gpc.mcore.checkpoint.checkpoints import Checkpoints

    with policy_of(config) as (policy, _):
        draw()
        assert Checkpoints(config, policy).resume() is not None
        return draw()


def save_at(config: Config, steps: list[int]) -> list[str]:
    """Save after each of these steps; what the run's folder of checkpoints holds at the end."""
    from megatron_gpc.mcore.checkpoint.checkpoints import Checkpoints

    with policy_of(config) as (policy, _):
        checkpoints = Checkpoints(config, policy)
        for step in steps:
            checkpoints.save(TrainState(step))
        checkpoints.wait()
        return sorted(os.listdir(config.run_dir / "checkpoints"))


def failed_save(config: Config, trouble: str) -> tuple[str, int]:
    """Save after step 5, then after step 6 in trouble; what is said, and the step resumed at then.

    Args:
        trouble: "kill" (rank 1's process is killed), "hang" (it stands still), "finish" (rank 0
            cannot write the last file) or "" (the disk's own).
    """
    from megatron_gpc.mcore.checkpoint.checkpoints import Checkpoints

    with policy_of(config) as (policy, _):
        checkpoints = Checkpoints(config, policy)
        checkpoints.save(TrainState(5))
        checkpoints.wait()
        try:
            checkpoints.save(TrainState(6))
            cause_trouble(config.run_dir / "checkpoints" / "step_000006.part", trouble)
            checkpoints.wait()
            said = "nothing"
        except UserError as error:
            said = str(error)
        dist.barrier()
        assert not list((config.run_dir / "checkpoints").glob("*.part"))
        assert not psutil.Process().children(), "the process that writes is gone"
        return said, checkpoints.resume().step


def cause_trouble(part: Path, trouble: str) -> None:
    if trouble in ("kill", "hang") and dist.get_rank() == 1:
        (writer,) = psutil.Process().children()
        writer.send_signal({"kill": signal.SIGKILL, "hang": signal.SIGSTOP}[trouble])
    if trouble == "finish" and dist.get_rank() == 0:
        (part / "metadata.json").mkdir()


def resumed(config: Config) -> tuple[int | str, str]:
    """(step that is resumed or what is refused, what is printed on stderr)."""
    from megatron_gpc.mcore.checkpoint.checkpoints import Checkpoints

    said = io.StringIO()
    with policy_of(config) as (policy, _), contextlib.redirect_stderr(said):
        try:
            state = Checkpoints(config, policy).resume()
        except UserError as error:
            return str(error), said.getvalue()
    return (state.step if state else 0), said.getvalue()


def loaded_object(folder: Path) -> Any:
    """What is saved as `x` in a checkpoint of torch's; or else the error."""
    from megatron.core.dist_checkpointing.strategies.torch import MCoreLoadPlanner

    state: dict[str, Any] = {"x": None}
    planner = MCoreLoadPlanner(flatten_state_dict=False)
    try:
        torch.distributed.checkpoint.load(state, checkpoint_id=folder, planner=planner)
    except torch.distributed.checkpoint.CheckpointException as error:
        return str(error)
    return planner.state_dict["x"]  # a copy


def refused_scales(state: dict[str, Any]) -> str:
    from megatron_gpc.mcore.checkpoint.state import _refuse_pickles

    try:
        _refuse_pickles(state, Path("folder"))
    except UserError as error:
        return str(error)
    return ""


def spoil(file: Path) -> None:
    """Flip one bit in the middle."""
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
