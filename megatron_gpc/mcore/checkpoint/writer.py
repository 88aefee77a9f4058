"""Write one rank's part of a checkpoint, in a process of its own.

megatron-core plans who writes which pieces; its own way of writing them starts a manager, a process
a rank and a process a file.  Here it is one process a rank, forked, so that it sees the state as it
was at that moment however long it takes (on CUDA: a copy in host memory).  It ends with its rank,
and it hashes what it has written, so that neither keeps the training waiting.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import queue
import signal
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.state_dict_utils import save_preprocess
from megatron.core.dist_checkpointing.strategies.common import COMMON_STATE_FNAME
from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync
from megatron.core.dist_checkpointing.strategies.fully_parallel import (
    FullyParallelSaveStrategyWrapper,
)
from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy

from megatron_gpc.mcore.checkpoint.folder import bring_to_disk
from megatron_gpc.mcore.setup import is_main
from megatron_gpc.run.child import die_with
from megatron_gpc.run.files import sha256
from megatron_gpc.run.stop import STOP_SIGNALS


@dataclass(frozen=True)
class Written:
    """What a rank's process reports."""

    results: list[Any]
    """torch's WriteResult of every piece, for the checkpoint's `.metadata`."""
    sums: dict[str, str]
    """File name -> SHA-256."""


class _Strategy(TorchDistSaveShardedStrategy):
    """megatron-core's `torch_dist` format, one file a rank; hands out the planned writer."""

    def __init__(self) -> None:
        super().__init__("torch_dist", 1, thread_count=1)

    def _get_save_and_finalize_callbacks(self, writer: Any, save_state_dict_ret: Any) -> Any:
        return writer, save_state_dict_ret[1]


def strategy() -> FullyParallelSaveStrategyWrapper:
    """Shares what data-parallel ranks have in common out among them.  Made once a run, because it
    caches."""
    group: Any = parallel_state.get_data_parallel_group(with_context_parallel=True)
    return FullyParallelSaveStrategyWrapper(
        _Strategy(),
        group,
        do_cache_distribution=True,
    )


class RankWriter:
    """Plans (a collective) and starts writing; the caller polls `outcome`.

    Args:
        content: what to save, as megatron-core's dist_checkpointing.save takes it.
        folder: exists, and is empty.
        plan: what `strategy` gives.
    """

    def __init__(
        self, content: dict[str, Any], folder: Path, plan: FullyParallelSaveStrategyWrapper
    ):
        sharded, common = save_preprocess(content, validate_access_integrity=False)
        given: Any = sharded
        planned: Any = plan.async_save(given, folder)  # what _Strategy hands out
        self.writer, self.metadata = planned
        buckets = FileSystemWriterAsync.preload_tensors(self.writer.write_buckets)
        context = multiprocessing.get_context("fork")
        written = (folder, self.writer.transforms, buckets, common if is_main() else None)
        self._receiver, sender = context.Pipe(duplex=False)
        self._process = context.Process(
            target=_write,
            args=(os.getpid(), *written, sender),
            daemon=True,
        )
        self._process.start()
        sender.close()
        self.writer.write_buckets = None  # or this rank would hold the copies until the end
        self._outcome: Written | str | None = None

    def outcome(self) -> Written | str | None:
        """None while it is writing, then what was written or what went wrong."""
        if self._outcome is None and self._receiver.poll():
            try:
                self._outcome = self._receiver.recv()
            except EOFError:
                self._outcome = "the process that writes it was ended from outside"
            self._process.join()
        return self._outcome

    def stop(self) -> None:
        """End the process, whatever it is doing."""
        self._process.kill()
        self._process.join()


def _write(
    parent: int,
    folder: Path,
    transforms: Any,
    buckets: list[Any],
    common: Any,
    sender: Connection,
) -> None:
    """In the forked process: write, bring to the disk, hash, report."""
    die_with(parent)
    for one in STOP_SIGNALS:
        signal.signal(one, signal.SIG_IGN)  # the rank decides when to stop
    gc.disable()  # CUDA tensors of the rank must not be freed here
    try:
        sender.send(_write_files(folder, transforms, buckets, common))
    except (OSError, RuntimeError) as error:
        sender.send(_cause(error))
    sender.close()
    # Past the interpreter's own end, which flushes streams: a thread of the rank may have held
    # their locks when this process was forked, and it is not here to give them back.
    os._exit(0)


def _cause(error: BaseException) -> str:
    """The first error of a chain: torch's zip writer hides a full disk behind a complaint about
    positions."""
    while error.__context__ is not None:
        error = error.__context__
    return f"{type(error).__name__}: {error}"


def _write_files(folder: Path, transforms: Any, buckets: list[Any], common: Any) -> Written:
    sums, results = {}, []
    if common is not None:
        with (folder / COMMON_STATE_FNAME).open("wb") as stream:
            torch.save(common, stream)
        bring_to_disk(folder / COMMON_STATE_FNAME)
        sums[COMMON_STATE_FNAME] = sha256(folder / COMMON_STATE_FNAME)
    for number, bucket in enumerate(buckets):
        answer: queue.Queue[Any] = queue.Queue()
        count: queue.Queue[int] = queue.Queue()
        count.put(number)
        write: Any = FileSystemWriterAsync.write_preloaded_data  # queues of any kind will do
        write([transforms], number, bucket, answer, count, use_fsync=True)
        _, written = answer.get_nowait()
        if isinstance(written, Exception):
            raise written
        results += written
        name = bucket[1]
        sums[name] = sha256(folder / name)
    return Written(results, sums)
