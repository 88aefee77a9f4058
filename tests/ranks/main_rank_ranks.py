"""What the ranks of a pool do with a MainRank."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist


def outcome(fail: str, log: Path) -> tuple[Any, ...]:
    """(what a call gave, what a method of the main rank's object gave, what was raised)."""
    from megatron_gpc.mcore.main_rank import MainRank

    given: list[Any] = []
    try:
        with MainRank() as main:
            given.append(main(dist.get_rank))
            entered = main.enter(_logging, log)
            given.append(main(entered.upper))
            main.feed(_consumer(fail), _collectives())
            main(_raising(fail))
            given.append("the end")
    except Exception as error:
        return (*given, type(error).__name__, str(error), log.exists())
    return (*given, log.exists())


def called_elsewhere() -> str:
    """What an object of the main rank's says to a rank that calls it directly."""
    from megatron_gpc.mcore.main_rank import MainRank

    with MainRank() as main:
        made = main.make(str, "here")
        try:
            return made.upper()
        except AssertionError as error:
            return str(error)


@contextlib.contextmanager
def _logging(log: Path) -> Iterator[str]:
    """Writes the log when it is left, after a moment in which others could end."""
    import time

    try:
        yield "entered"
    finally:
        time.sleep(0.3)
        log.write_text("closed")


def _collectives() -> Iterator[int]:
    """Three sums over all ranks."""
    for _ in range(3):
        total = torch.ones(1)
        dist.all_reduce(total)
        yield int(total)


def _consumer(fail: str) -> Callable[[Iterator[int]], None]:
    def consume(items: Iterator[int]) -> None:
        assert next(items) == dist.get_world_size()
        if fail == "feed":
            raise KeyError("in the middle")

    return consume


def _raising(fail: str) -> Callable[[], None]:
    from megatron_gpc.errors import UserError

    def work() -> None:
        if fail == "user":
            raise UserError("mend it")
        if fail == "bug":
            raise ZeroDivisionError("a bug")

    return work
