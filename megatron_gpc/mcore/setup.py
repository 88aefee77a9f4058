"""Processes: who am I, which group am I in.

The training processes are plain SPMD.  Whoever started them (`megatron-gpc train`, torchrun, srun)
told them rank, world size and rendezvous through the environment; from here on there is no
difference.
"""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TypeVar

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

from megatron_gpc.config import Config
from megatron_gpc.config.layout import check_world

T = TypeVar("T")
GPU_ENVIRONMENT = {
    # Kernels start in the order in which the host asks for them, so that communication that
    # megatron-core starts first does run beside the matrix products that follow.
    "CUDA_DEVICE_MAX_CONNECTIONS": "1",
    # Micro-batches differ in length: blocks of memory of one size would seldom fit the next.
    "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True",
}
"""What a rank on a GPU sets unless it is set; engines do not inherit it (engines/process.py)."""


@contextmanager
def process_groups(config: Config) -> Iterator[None]:
    """Join the other ranks, build megatron-core's groups, seed; leave them at the end.

    CPU tensors travel over gloo, CUDA tensors over NCCL.  Every wait ends after config.timeout_s.

    Raises:
        UserError: the number of processes does not fit the layout.
    """
    check_world(config.parallel, int(os.environ["WORLD_SIZE"]))
    backend = "gloo"
    if torch.cuda.is_available():
        for name, value in GPU_ENVIRONMENT.items():
            os.environ.setdefault(name, value)  # before the GPU is first used
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        backend = "cpu:gloo,cuda:nccl"
    dist.init_process_group(backend, timeout=timedelta(seconds=config.timeout_s))
    initialize_model_parallel(config)
    try:
        yield
    finally:
        # After an error the other ranks may be inside a collective that this one will never enter:
        # leaving without a word ends them at once, a clean farewell would wait for them.
        parallel_state.destroy_model_parallel()
    dist.destroy_process_group()


def initialize_model_parallel(config: Config) -> None:
    """megatron-core's groups and random generators for a layout, in an initialized world."""
    p = config.parallel
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=p.tp,
        pipeline_model_parallel_size=p.pp,
        virtual_pipeline_model_parallel_size=p.vpp,
        context_parallel_size=p.cp,
        expert_model_parallel_size=p.ep,
        distributed_timeout_minutes=max(1, round(config.timeout_s / 60)),
    )
    seed_generators(config.seed)


def seed_generators(seed: int) -> None:
    """Seed every random generator of this rank; megatron-core's differ between parallel ranks."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
    model_parallel_cuda_manual_seed(seed, force_reset_rng=True)


def device() -> torch.device:
    """Where this rank computes."""
    if torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def is_main() -> bool:
    """Rank 0: talks to the rollout server, writes metrics."""
    return dist.get_rank() == 0


def from_main(value: T) -> T:
    """Rank 0's value on every rank.  A collective: every rank enters it."""
    if dist.get_world_size() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def wait_for_all() -> None:
    """Return once every rank has come here.  A collective: every rank enters it."""
    on_any_rank(False)


def on_any_rank(flag: bool) -> bool:
    """Whether the flag is set on at least one rank.  A collective: every rank enters it."""
    if dist.get_world_size() == 1:
        return flag
    box = torch.tensor(int(flag))
    dist.all_reduce(box, op=dist.ReduceOp.MAX)
    return bool(box)


def sum_over_ranks(tensor: torch.Tensor) -> torch.Tensor:
    """Sum of a CPU tensor over all ranks, in place.  A collective: every rank enters it.

    Where exactly one rank contributes an element and all others 0, the sum is exact.
    """
    if dist.get_world_size() > 1:
        dist.all_reduce(tensor)
    return tensor
