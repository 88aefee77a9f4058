"""What torchrun and srun say in environment variables, held to what it can be."""

from __future__ import annotations

import os
import re
from typing import NamedTuple

from megatron_gpc.errors import UserError

MOST_PROCESSES = 2**20
TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
SRUN = ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID")


class ProcessRank(NamedTuple):
    """Which of how many processes this is."""

    rank: int
    world: int
    local_rank: int


def number(name: str, low: int, high: int, default: int | None = None) -> int:
    """The whole number from low to high that a variable holds; `default` if it is not set.

    Raises:
        UserError: it is not set and there is no default, or holds something else.
    """
    text = os.environ.get(name)
    if text is None and default is not None:
        return default
    starter = "srun" if name.startswith("SLURM") else "torchrun"
    if text is None:
        raise UserError(f"{name} is not set, as {starter} sets it; export it, or unset the others")
    if not (text.isascii() and text.isdigit() and len(text) < 10 and low <= int(text) <= high):
        raise UserError(
            f"{name}={text[:60]!r}: expected a whole number from {low} to {high}, as {starter} "
            "sets it; put it right, or unset it"
        )
    return int(text)


def place(names: tuple[str, str, str]) -> ProcessRank:
    """This process among those that torchrun (TORCHRUN) or srun (SRUN) has started.

    Raises:
        UserError: a variable is missing, or cannot be.
    """
    rank, world, local = names
    processes = number(world, 1, MOST_PROCESSES)
    found = number(rank, 0, processes - 1)
    return ProcessRank(found, processes, number(local, 0, processes - 1))


def step() -> tuple[int, int]:
    """(tasks, nodes) of the step that srun started this process in; (1, 1) elsewhere.

    Raises:
        UserError: what they are is no number.
    """
    tasks = number("SLURM_STEP_NUM_TASKS", 1, MOST_PROCESSES, default=1)
    return tasks, number("SLURM_STEP_NUM_NODES", 1, tasks, default=1)


def in_step() -> bool:
    """Whether srun has started this process."""
    return "SLURM_STEP_ID" in os.environ


def is_first() -> bool:
    """Whether this is the first, or the only one, of the processes that were started together."""
    return os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")) == "0"


def master() -> tuple[str, int]:
    """Address and port where all processes meet.

    Raises:
        UserError: MASTER_ADDR and MASTER_PORT do not say.
    """
    address = os.environ.get("MASTER_ADDR", "")
    if not re.fullmatch(r"[A-Za-z0-9._:%-]{1,255}", address):
        raise UserError(
            f"this is one of several processes, and MASTER_ADDR={address[:60]!r} is no host to "
            "meet at; submit slurm/train.sbatch, or export MASTER_ADDR and MASTER_PORT in the "
            "batch script"
        )
    return address, number("MASTER_PORT", 1, 65535)
