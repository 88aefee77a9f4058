"""Checkpoints of a run: written whole or not at all, verified before they are taken over.

The format is megatron-core's `torch_dist`, with SHA256SUMS beside it.  See docs/checkpoints.md.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config

from megatron_gpc.config import Config
from megatron_gpc.errors import UserError
from megatron_gpc.mcore.checkpoint import folder as folders
from megatron_gpc.mcore.checkpoint.load import load_folder
from megatron_gpc.mcore.checkpoint.state import content, take_over
from megatron_gpc.mcore.checkpoint.writer import RankWriter, Written, strategy
from megatron_gpc.mcore.policy import Policy
from megatron_gpc.mcore.setup import from_main, is_main, sum_over_ranks
from megatron_gpc.run.files import LAST, by_step, problems, sha256
from megatron_gpc.run.say import say
from megatron_gpc.types import TrainState

T = TypeVar("T")
WRITER_POLL_S = 0.05
"""How often to look whether a save is complete while waiting for it [s]."""


@dataclass(frozen=True)
class _Save:
    """A checkpoint that is being written."""

    final: Path
    writer: RankWriter

    @property
    def part(self) -> Path:
        return folders.part_name(self.final)


class Checkpoints:
    """The checkpoints of one run.  Every method is a collective: every rank enters it."""

    def __init__(self, config: Config, policy: Policy):
        self.config, self.policy = config, policy
        self._plan = strategy()
        self._save: _Save | None = None
        self.saved = 0
        """Finished steps of the newest checkpoint, once `start` has looked; 0: there is none."""

    def start(self) -> TrainState:
        """Where the run goes on: `resume`, or at its first step with the weights of model.hf.

        Raises:
            UserError: see `resume`; or the weights of model.hf cannot be used.
        """
        state = self.resume()
        if state is None:
            load_folder(self.policy, self.config.model.hf)
            self.policy.weights_changed()
            state = TrainState()
        self.saved = state.step
        return state

    def after_step(
        self, state: TrainState, sampling: Callable[[], dict[str, Any]]
    ) -> dict[str, float]:
        """Complete the checkpoint in the background if all have written it, and begin one if that
        is due.

        Args:
            state: but for its `sampling`, which may have to be waited for.

        Returns:
            seconds_checkpoint, which it took.

        Raises:
            UserError: see `poll` and `save`.
        """
        begin, every = time.perf_counter(), self.config.checkpoint.every
        self.poll()
        if state.step == self.config.train.steps or (every > 0 and state.step % every == 0):
            self.save(replace(state, sampling=sampling()))
        return {"seconds_checkpoint": time.perf_counter() - begin}

    def before_end(self, state: TrainState, sampling: Callable[[], dict[str, Any]]) -> None:
        """Save the state unless it is saved, and wait for that; for the arguments see `after_step`.

        Raises:
            UserError: see `save` and `wait`.
        """
        if self.saved != state.step:
            self.save(replace(state, sampling=sampling()))
        self.wait()

    def resume(self) -> TrainState | None:
        """Load the newest checkpoint that is not damaged; None if the run has no checkpoint yet.

        Every file is read and compared with its checksum first; the ranks share this work.  A
        damaged checkpoint is named on rank 0's stderr and renamed to `step_NNNNNN.damaged`; then
        the one before is checked.

        Raises:
            UserError: there are checkpoints, but none is sound; or it is not of this model.
        """
        run_dir = self.config.run_dir

        def found() -> dict[int, Path]:
            folders.remove_parts(run_dir)
            return by_step(run_dir / "checkpoints")

        there = _on_main(found, f"{run_dir}/checkpoints: cannot be used")
        for step, folder in reversed(there.items()):
            wrong = problems(folder, dist.get_rank(), dist.get_world_size())
            if not (wrong := sorted({one for share in _gather(wrong) for one in share})):
                say(f"resuming from step {step} ({folder.parent.name}/{folder.name})")
                return take_over(self.config, self.policy, folder)
            aside = _on_main(lambda f=folder: folders.set_aside(f), f"{folder}: cannot be renamed")
            say(
                f"warning: {folder} is damaged: {'; '.join(wrong)}; "
                f"it was renamed to {aside.name}, the one before is looked at"
            )
        if damaged := from_main(folders.damaged(run_dir) if is_main() else None):
            names = ", ".join(folder.name for folder in damaged)
            raise UserError(
                f"{run_dir}/checkpoints: no checkpoint is sound ({names}); put one back that is, "
                "under its name without .damaged, or start over with resume=none, which sets the "
                "run aside"
            )
        return None

    def save(self, state: TrainState) -> None:
        """Begin a checkpoint; with checkpoint.asynchronous=false also end it.

        Raises:
            UserError: it cannot be written; or, before it was begun, the one before could not.
        """
        self.wait()
        final = folders.final_name(self.config.run_dir, state.step)
        part = folders.part_name(final)
        _on_main(lambda: part.mkdir(parents=True), f"{final}: cannot be written")
        writer = RankWriter(content(self.config, self.policy, state), part, self._plan)
        self._save, self.saved = _Save(final, writer), state.step
        if not self.config.checkpoint.asynchronous:
            self.wait()

    def wait(self) -> None:
        """Complete the checkpoint in the background, if there is one.

        Raises:
            UserError: it could not be written, or not within config.timeout_s from now.
        """
        deadline = time.monotonic() + self.config.timeout_s
        while self._save is not None:
            time.sleep(WRITER_POLL_S)
            self.poll(overdue=time.monotonic() > deadline)

    def poll(self, overdue: bool = False) -> None:
        """Agree on how far the save in the background is; complete it if all ranks have written,
        give it up if one has failed or it is overdue.  Never waits.

        Raises:
            UserError: it was given up.
        """
        if (save := self._save) is None:
            return
        outcome = save.writer.outcome()
        if outcome is None and overdue:
            outcome = f"it took longer than timeout_s={self.config.timeout_s:g}"
        ranks = torch.tensor([outcome is None, isinstance(outcome, str)], dtype=torch.int)
        writing, failed = sum_over_ranks(ranks).tolist()
        if failed:
            self._give_up(save, outcome if isinstance(outcome, str) else None)
        elif not writing:
            assert isinstance(outcome, Written)
            self._complete(save, outcome)

    def _give_up(self, save: _Save, reason: str | None) -> None:
        self._save = None
        save.writer.stop()
        reasons = _gather(reason)  # also: every rank's process has ended
        if is_main():
            shutil.rmtree(save.part, ignore_errors=True)
        said = next(f"rank {rank}: {one}" for rank, one in enumerate(reasons) if one)
        raise UserError(f"{save.final}: cannot be written: {said}; {self._what_is_left()}")

    def _complete(self, save: _Save, mine: Written) -> None:
        """Describe, checksum and publish what all ranks have written; then remove old ones."""
        self._save = None
        everyone: list[Any] | None = [None] * dist.get_world_size() if is_main() else None
        dist.gather_object(mine, everyone)

        def publish() -> None:
            assert everyone is not None
            try:
                save.writer.writer.finish(
                    save.writer.metadata, [written.results for written in everyone]
                )
                save_config(CheckpointingConfig("torch_dist", 1), str(save.part))
                sums = {}
                for name in (".metadata", LAST):
                    folders.bring_to_disk(save.part / name)
                    sums[name] = sha256(save.part / name)
                for written in everyone:
                    sums |= written.sums
                folders.publish(save.part, save.final, sums)
            except OSError:
                shutil.rmtree(save.part, ignore_errors=True)
                raise

        _on_main(publish, f"{save.final}: cannot be written", self._what_is_left())
        kept = self.config.checkpoint
        _on_main(
            lambda: folders.remove_old(self.config.run_dir, kept.keep, kept.keep_every),
            f"{save.final} was written, but older ones cannot be removed",
        )

    def _what_is_left(self) -> str:
        left = folders.checkpoints(self.config.run_dir)
        start = left[-1].name if left else "the start, for there is none before it"
        return (
            "nothing of it was left, and older ones are as they were; once the cause is mended, "
            f"the same command continues from {start}"
        )


def _gather(value: T) -> list[T]:
    """Every rank's value, on every rank."""
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def _on_main(work: Callable[[], T], what: str, way_out: str = "") -> T:
    """Do file work on rank 0; all ranks get its result, or its OSError as a UserError."""
    value: Any = None
    problem = ""
    if is_main():
        try:
            value = work()
        except OSError as error:
            problem = f"{what}: {error}" + (f"; {way_out}" if way_out else "")
    value, problem = from_main((value, problem))
    if problem:
        raise UserError(problem)
    return value
