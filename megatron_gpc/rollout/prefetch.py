"""The rollout that is under way: started now or ahead, waited for, kept over a restart."""

from __future__ import annotations

import asyncio
import dataclasses
from concurrent.futures import Future
from typing import Any

from megatron_gpc.engines.fleet import LONG_S, Fleet, WeightsNeeded
from megatron_gpc.errors import UserError
from megatron_gpc.rollout.collector import Collector
from megatron_gpc.rollout.groups import Rollout
from megatron_gpc.types import Sample


class Prefetch:
    """At most one rollout at a time; everything is called on the trainer's thread."""

    def __init__(self, fleet: Fleet, collector: Collector):
        self.fleet, self.collector = fleet, collector
        self._step = 0
        self._future: Future[Rollout] | None = None

    def start(self, step: int) -> None:
        """Begin to collect a training step's samples."""
        assert self._future is None, f"step {self._step} is under way"
        self._step = step
        self._future = asyncio.run_coroutine_threadsafe(
            self.collector.collect(step), self.fleet.loop
        )

    def result(self, step: int) -> Rollout | None:
        """The samples of a step, started here where nobody has; None: the engines need weights.

        Raises:
            RolloutError: the engines failed beyond what is configured.
        """
        if self._future is None:
            self.start(step)
        assert self._step == step and self._future is not None
        future, self._future = self._future, None
        try:
            return future.result(LONG_S)
        except WeightsNeeded:
            return None

    def state(self) -> dict[str, Any]:
        """What the next steps depend on, as plain values; waits for what is under way.

        A rollout that was made ahead belongs to it: made again after a restart it would be of other
        weights.
        """
        ahead = None
        if self._future is not None:
            try:
                rollout = self._future.result(LONG_S)
                ahead = {"step": self._step, **dataclasses.asdict(rollout)}
            except WeightsNeeded:
                self._future = None  # nothing was made
        return {**self.collector.state(), "ahead": ahead}

    def restore(self, state: dict[str, Any]) -> None:
        """Continue where `state` was taken.

        Raises:
            UserError: see Collector.restore; or it is the state of something else.
        """
        try:
            self._restore(state)
        except UserError:
            raise
        except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
            raise UserError(
                "the checkpoint's state of prompts and samples is not one "
                f"({type(error).__name__}: {error!s:.200}); go back to the checkpoint before it"
            ) from error

    def _restore(self, state: dict[str, Any]) -> None:
        still_so, ahead = self.collector.restore(state), state["ahead"]
        if ahead is not None and not still_so:
            self.collector.source.give_back(ahead["positions"])
        elif ahead is not None:
            self._step = ahead["step"]
            self._future = Future()
            self._future.set_result(
                Rollout(
                    [Sample.from_plain(values) for values in ahead["samples"]],
                    ahead["positions"],
                    ahead["metrics"],
                )
            )
