"""The kinds of faults by name; those of a kind take turns."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from chaos.campaign import Fault
from chaos.disk import FlippedByte, FolderIsGone, FullDisk, NoWriting
from chaos.kills import KillEngine, KillLauncher, KillRank

KINDS: dict[str, Callable[[Path], Sequence[Fault]]] = {
    "rank": lambda _: [KillRank()],
    "launcher": lambda _: [KillLauncher()],
    "engine": lambda _: [KillEngine(sync) for sync in ("disk", "tensor", "distributed")],
    "disk": lambda _: [FullDisk(), NoWriting(), FolderIsGone(), FlippedByte()],
}
"""kind -> the faults, which are given `make_task`'s folder."""
