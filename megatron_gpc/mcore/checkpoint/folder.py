"""Checkpoint folders: which are complete, whether they are sound, which are kept.

A folder that carries its final name, `step_NNNNNN`, is complete: it is written as
`step_NNNNNN.part`, brought to the disk, and renamed.  Files and folders only; no collectives.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path

from megatron_gpc.run.files import SUMS, by_step, name_of_step


def checkpoints(run_dir: Path) -> list[Path]:
    """Complete checkpoints of a run, oldest first."""
    return list(by_step(run_dir / "checkpoints").values())


def damaged(run_dir: Path) -> list[Path]:
    """Checkpoints that `set_aside` has renamed."""
    return sorted((run_dir / "checkpoints").glob("step_*.damaged*"))


def final_name(run_dir: Path, step: int) -> Path:
    return run_dir / "checkpoints" / name_of_step(step)


def part_name(final: Path) -> Path:
    return final.with_name(final.name + ".part")


def remove_parts(run_dir: Path) -> None:
    """Remove what runs that were killed left half written, or half removed."""
    for part in (run_dir / "checkpoints").glob("step_*.part"):
        shutil.rmtree(part)


def bring_to_disk(path: Path) -> None:
    """fsync of a file's bytes, or of a folder's names."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def publish(part: Path, final: Path, sums: Mapping[str, str]) -> None:
    """Give a folder its checksums and, once all of it is on the disk, its final name."""
    lines = [f"{digest}  {name}\n" for name, digest in sorted(sums.items())]
    (part / SUMS).write_text("".join(lines))
    bring_to_disk(part / SUMS)
    bring_to_disk(part)
    part.rename(final)
    bring_to_disk(final.parent)


def set_aside(folder: Path) -> Path:
    """Rename a damaged checkpoint, so that it is never checked again or taken for a sound one."""
    number, aside = 1, folder.with_name(folder.name + ".damaged")
    while aside.exists():
        number += 1
        aside = folder.with_name(f"{folder.name}.damaged-{number}")
    folder.rename(aside)
    return aside


def remove_old(run_dir: Path, keep: int, keep_every: int) -> None:
    """Remove all but the newest `keep` checkpoints and those of every keep_every-th step.

    A folder loses its final name first: half removed it is no checkpoint.
    """
    for step, old in list(by_step(run_dir / "checkpoints").items())[:-keep]:
        if not keep_every or step % keep_every:
            shutil.rmtree(old.rename(part_name(old)))
