"""Ends a run that cannot succeed: too many updates are left out, or a rank is silent."""

from __future__ import annotations

import faulthandler
import os
import signal
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch.distributed.elastic.multiprocessing.errors import ErrorHandler, record

from megatron_gpc.config import Config
from megatron_gpc.errors import RunStopped
from megatron_gpc.run.launch import STACKS_SIGNAL, stacks_file
from megatron_gpc.types import Bounds, RolloutBatch, TokenStreams


def recorded(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function; if it raises, the traceback goes to the file that the launcher has named.

    torchrun and `launch.run_ranks` name one for every rank and show that of the first to fail.
    """
    return record(function, _ErrorHandler())


class _ErrorHandler(ErrorHandler):
    def record_exception(self, e: BaseException) -> None:
        with suppress(OSError):  # if the disk is full, the error itself is still raised
            super().record_exception(e)


class SkippedUpdates:
    """Updates that were left out because their loss or gradient was not finite.

    Args:
        names: of those that a run left out before it was continued, `TrainState.skipped`.
    """

    def __init__(self, config: Config, names: list[str]):
        self.folder = config.run_dir / "skipped"
        self.limit = config.guard.max_skipped_updates
        self.names = list(names)

    def add(self, step: int, update: int) -> Path:
        """Count update `update` of training step `step` (both from 1).

        Returns:
            The file that its mini-batch is to be saved in.
        """
        self.names.append(f"step_{step:06d}_update_{update}.pt")
        return self.folder / self.names[-1]

    def check(self) -> None:
        """Raises:
        RunStopped: there are more of them than guard.max_skipped_updates; on every rank.
        """
        if len(self.names) > self.limit:
            raise RunStopped(
                f"loss or gradient was not finite in {len(self.names)} updates "
                f"(guard.max_skipped_updates={self.limit}); lower optim.lr, or look at their "
                "mini-batches: " + ", ".join(str(self.folder / name) for name in self.names)
            )


def save_mini_batch(
    file: Path, batch: RolloutBatch, samples: list[int], streams: TokenStreams, bounds: Bounds
) -> None:
    """Write what an update saw, for `torch.load(file)`; the file appears whole or not at all.

    A dictionary: `samples` (their numbers in the rollout), `tokens` (one int64 tensor a sample,
    prompt and response), `prompt_lengths_N`, `rewards_N`, `advantages_N`, `bounds` (Bounds' four
    numbers), and what the loss read of response tokens alone, one tensor a sample: `rollout_logp`,
    `old_logp`, `weights`, with a reference model `reference_logp`, and what the loss's `prepare`
    gave under its names in `prepared`.
    """
    starts_N = batch.starts_N
    ends_N = starts_N + batch.prompt_lengths_N + batch.response_lengths_N
    of_samples = [streams.at(batch.response_slice(n)).map(torch.Tensor.clone) for n in samples]
    content = {
        "samples": samples,
        "tokens": [batch.tokens[starts_N[n] : ends_N[n]].clone() for n in samples],
        "prompt_lengths_N": batch.prompt_lengths_N[samples],
        "rewards_N": batch.rewards_N[samples],
        "advantages_N": batch.advantages_N[samples],
        "bounds": asdict(bounds),
        "prepared": {name: [one.prepared[name] for one in of_samples] for name in streams.prepared},
    }
    for name in ("rollout_logp", "old_logp", "weights", "reference_logp"):
        if getattr(streams, f"{name}_T") is not None:
            content[name] = [getattr(one, f"{name}_T") for one in of_samples]
    file.parent.mkdir(exist_ok=True)
    part = file.with_name(file.name + ".part")
    torch.save(content, part)
    part.replace(file)


class Watchdog:
    """Ends this process if it shows no sign of life during a `with` block.

    The timer is a C thread's: it needs neither Python's main thread nor its lock, so that it works
    if a collective or a file system hangs.  The stacks of all threads are written to
    `launch.stacks_file` first.  The launcher may ask for them too, see `launch.STACKS_SIGNAL`.
    """

    def __init__(self, config: Config):
        self._seconds = 60.0 * config.guard.silent_minutes
        self._file = stacks_file(config.run_dir / "logs", int(os.environ["RANK"]))

    def __enter__(self) -> Watchdog:
        self._file.parent.mkdir(exist_ok=True)
        self._stacks = self._file.open("w")
        signal.signal(STACKS_SIGNAL, signal.SIG_IGN)  # what it does again after the block
        faulthandler.register(STACKS_SIGNAL, file=self._stacks, all_threads=True)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {STACKS_SIGNAL})  # ranks start with it blocked
        self.alive()
        return self

    def __exit__(self, *_: object) -> None:
        faulthandler.cancel_dump_traceback_later()
        faulthandler.unregister(STACKS_SIGNAL)
        self._stacks.close()
        if self._file.stat().st_size == 0:
            self._file.unlink()

    def alive(self) -> None:
        """A part of a training step has ended: start the time of silence again."""
        if self._seconds > 0:
            faulthandler.dump_traceback_later(self._seconds, exit=True, file=self._stacks)
