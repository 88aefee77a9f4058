"""The process group in which new weights are broadcast: the trainer is rank 0, engines follow.

Neither side is in the other's torch.distributed world, so the group is made beside the default one.
SGLang makes its end in the same way (`init_custom_process_group`), and both have to, key by key of
the store.
"""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import torch.distributed as dist
from torch.distributed.distributed_c10d import (  # no public way makes a group across two worlds
    Backend,
    PrefixStore,
    Store,
    _new_process_group_helper,
    _world,
)


def join_group(
    store: Store, name: str, rank: int, world_size: int, backend: str, timeout_s: float
) -> dist.ProcessGroup:
    """This process's end of the group; returns when all `world_size` processes have come.

    Args:
        store: a TCPStore on the trainer's side, and clients of it.
        name: of the group, the same everywhere and never used twice in a process.
        rank: 0 for the trainer.
        backend: `gloo` or `nccl`.
        timeout_s: for joining and for every broadcast [s].

    Raises:
        RuntimeError: not all came in time.
    """
    timeout = timedelta(seconds=timeout_s)
    make: Any = _new_process_group_helper  # its annotations leave out what it takes
    group, _ = make(
        world_size,
        rank,
        [],
        Backend(backend),
        PrefixStore(name, store),
        group_name=name,
        timeout=timeout,
    )
    _world.pg_group_ranks[group] = {i: i for i in range(world_size)}
    return group


def leave_group(group: dist.ProcessGroup) -> None:
    """Give it up; the others notice at their next broadcast."""
    dist.destroy_process_group(group)
