"""The kinds of faults by name; a campaign goes through those of its kind in this order."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from chaos.campaign import Fault
from chaos.clock import JumpClock
from chaos.disk import FlippedByte, FolderIsGone, FullDisk, FullInTheEnd, NoWriting
from chaos.kills import KillEngine, KillLauncher, KillRank
from chaos.network import CutForAWhile, CutTooLong
from chaos.stops import StopEngineTooLong, StopForAWhile, StopRankTooLong

KINDS: dict[str, Callable[[Path], Sequence[Fault]]] = {
    "rank": lambda _: [KillRank()],
    "launcher": lambda _: [KillLauncher()],
    "engine": lambda _: [KillEngine(sync) for sync in ("disk", "tensor", "distributed")],
    "stop": lambda _: [StopForAWhile(), StopRankTooLong(), StopEngineTooLong()],
    "network": lambda task: [CutForAWhile(task), CutTooLong(task)],
    "disk": lambda _: [
        *(FullDisk(asynchronous=False), FullDisk(asynchronous=True)),
        *(FullInTheEnd(asynchronous=False), FullInTheEnd(asynchronous=True)),
        *(NoWriting(), FolderIsGone(), FlippedByte()),
    ],
    "clock": lambda _: [JumpClock()],
}
"""kind -> the faults, which are given `make_task`'s folder."""
