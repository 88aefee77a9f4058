"""A pool of gloo workers per world size, forked from one process that has imported megatron.

A test sends a function (by name: it is pickled) and gets every rank's result back, or the first
traceback.  Deadlines everywhere: a rank that hangs fails the test and takes its pool with it.
"""

from __future__ import annotations

import gc
import multiprocessing as mp
import os
import queue
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from multiprocessing import forkserver
from multiprocessing.context import BaseContext
from typing import Any

import pytest

from megatron_gpc.run.child import die_with

START_TIMEOUT_S = 120.0
MAX_TASKS = 40


def _context(cuda: bool) -> BaseContext:
    """How ranks are started: forked from a process that is started once, if without a GPU."""
    if cuda:  # a process that has looked at a GPU must not fork
        return mp.get_context("spawn")
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(["pool_imports"])
    with pytest.MonkeyPatch.context() as patch:  # it is not told of sys.path
        patch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
        patch.setenv("TRITON_INTERPRET", "1")  # read as triton is imported, which megatron does
        forkserver.ensure_running()
    return context


def _serve(rank: int, world: int, cuda: bool, store: str, inbox: Any, outbox: Any) -> None:
    die_with(os.getppid())
    os.environ.update(OMP_NUM_THREADS="1", RANK=str(rank), WORLD_SIZE=str(world))
    from datetime import timedelta

    import torch
    import torch.distributed as dist

    from megatron_gpc.mcore import cpu

    torch.set_num_threads(1)
    # Saving a checkpoint starts a process in every rank, and daemons may have none.
    mp.current_process()._config["daemon"] = False
    cpu.install()
    if cuda:  # by kernels that give the same bits every time, for tests that compare bits
        os.environ.update(NVTE_ALLOW_NONDETERMINISTIC_ALGO="0", CUBLAS_WORKSPACE_CONFIG=":4096:8")
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.cuda.set_device(rank)
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if cuda else "gloo",
        init_method=f"file://{store}",
        rank=rank,
        world_size=world,
        timeout=timedelta(seconds=120),
    )
    outbox.put((rank, None, "ready"))
    while True:
        task = inbox.get()
        if task is None:
            break
        function, arguments = task
        try:
            outbox.put((rank, None, function(*arguments)))
        except BaseException:
            outbox.put((rank, traceback.format_exc(), None))
        _leave_groups()
    dist.destroy_process_group()


def _leave_groups() -> None:
    """End the groups that a task made, and the models and optimizers that hold on to them.

    megatron-core forgets its groups without destroying them, and each keeps gloo threads that poll.
    Its models are never collected: the optimizer's parts of parameters hold, through C++, gradient
    accumulators whose hooks hold the model.  So what they hold is taken from them.
    """
    import torch.distributed as dist
    from megatron.core.distributed import DistributedDataParallel
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
    from torch.distributed import distributed_c10d

    for one in gc.get_objects():
        if type(one) in (DistributedDataParallel, DistributedOptimizer):
            vars(one).clear()
    del one
    for group in list(distributed_c10d._world.pg_map):
        if group is not dist.group.WORLD:
            dist.destroy_process_group(group)
    del group
    gc.collect()  # their threads end with the last reference


class Pool:
    """`world` ranks of one world, of which each has a GPU with `cuda`."""

    def __init__(self, world: int, cuda: bool = False):
        self.world = world
        self.tasks = 0
        context = _context(cuda)
        self.folder = tempfile.TemporaryDirectory()
        store = os.path.join(self.folder.name, "store")
        self.outbox = context.Queue()
        self.inboxes = [context.Queue() for _ in range(world)]
        self.processes = [
            context.Process(
                target=_serve,
                args=(rank, world, cuda, store, self.inboxes[rank], self.outbox),
                daemon=True,
            )
            for rank in range(world)
        ]
        for process in self.processes:
            process.start()
        self._collect(START_TIMEOUT_S)

    def run(
        self, function: Callable[..., Any], *arguments: Any, timeout_s: float = 120.0
    ) -> list[Any]:
        """function(*arguments) on every rank at once; the results in rank order."""
        self.tasks += 1
        for inbox in self.inboxes:
            inbox.put((function, arguments))
        return self._collect(timeout_s)

    def _collect(self, timeout_s: float) -> list[Any]:
        results: dict[int, Any] = {}
        errors: list[str] = []
        deadline = time.monotonic() + timeout_s
        while len(results) + len(errors) < self.world:
            try:
                rank, error, value = self.outbox.get(timeout=max(0.1, deadline - time.monotonic()))
            except queue.Empty as empty:
                self.close()
                raise TimeoutError(
                    f"{self.world - len(results)} of {self.world} ranks gave no answer within "
                    f"{timeout_s} s; first error: {errors[:1]}"
                ) from empty
            if error is None:
                results[rank] = value
            else:
                errors.append(f"rank {rank}:\n{error}")
        if errors:
            raise RuntimeError(errors[0])
        return [results[rank] for rank in range(self.world)]

    @property
    def fresh(self) -> bool:
        """Whether to go on with these processes.

        A model that was trained is never freed (DDP's hooks hold it through C++), nor are its
        groups: some fifty polling threads a task.  Past MAX_TASKS new processes cost less.
        """
        return self.tasks < MAX_TASKS and all(process.is_alive() for process in self.processes)

    def close(self) -> None:
        for inbox in self.inboxes:
            inbox.put(None)
        for process in self.processes:
            process.join(5)
            if process.is_alive():
                process.kill()
        self.folder.cleanup()


class Pools:
    """pools(n): n workers, kept until they are worn out; each has a GPU with `cuda`."""

    def __init__(self, cuda: bool = False) -> None:
        self.cuda = cuda
        self.pools: dict[int, Pool] = {}

    def __call__(self, world: int) -> Pool:
        if world in self.pools and not self.pools[world].fresh:
            self.pools.pop(world).close()
        if world not in self.pools:
            self.pools[world] = Pool(world, self.cuda)
        return self.pools[world]

    def close(self) -> None:
        for pool in self.pools.values():
            pool.close()
