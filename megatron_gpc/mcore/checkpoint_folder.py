"""Checkpoint folders: which are complete, whether they are sound, which are kept.

A folder that carries its final name, `step_NNNNNN`, is complete: it is written as
`step_NNNNNN.part`, brought to the disk, and renamed.  Files and folders only; no collectives.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Mapping
from pathlib import Path

PREFIX = "step_"
SUMS = "SHA256SUMS"
LAST = "metadata.json"
"""The last line of SHA256SUMS, which is sorted: without it the file was cut."""


def checkpoints(run_dir: Path) -> list[Path]:
    """Complete checkpoints of a run, oldest first."""
    found = [
        f for f in (run_dir / "checkpoints").glob(PREFIX + "*") if f.name[len(PREFIX) :].isdigit()
    ]
    return sorted(found, key=step_of)


def damaged(run_dir: Path) -> list[Path]:
    """Checkpoints that `set_aside` has renamed."""
    return sorted((run_dir / "checkpoints").glob(f"{PREFIX}*.damaged*"))


def step_of(folder: Path) -> int:
    """The training step after which a complete checkpoint was written."""
    return int(folder.name[len(PREFIX) :])


def final_name(run_dir: Path, step: int) -> Path:
    return run_dir / "checkpoints" / f"{PREFIX}{step:06d}"


def part_name(final: Path) -> Path:
    return final.with_name(final.name + ".part")


def remove_parts(run_dir: Path) -> None:
    """Remove what runs that were killed left half written, or half removed."""
    for part in (run_dir / "checkpoints").glob(f"{PREFIX}*.part"):
        shutil.rmtree(part)


def sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


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


def problems(folder: Path, share: int, shares: int) -> list[str]:
    """What is wrong with this share of a checkpoint's files; nothing where it is sound.

    Args:
        share: which one, 0 <= share < shares; all of them together see every file.
    """
    try:
        lines = [line.split("  ", 1) for line in (folder / SUMS).read_text().splitlines()]
    except FileNotFoundError:
        return [f"{SUMS} is missing"]
    except (OSError, UnicodeDecodeError) as error:
        return [f"{SUMS} cannot be read: {error}"]
    if not lines or lines[-1][-1] != LAST or any(len(line) != 2 for line in lines):
        return [f"{SUMS} is cut short or overwritten"]
    found = []
    for digest, name in lines[share::shares]:
        try:
            if sha256(folder / name) != digest:
                found.append(f"{name} is not what was written (its SHA-256 differs)")
        except FileNotFoundError:
            found.append(f"{name} is missing")
        except OSError as error:
            found.append(f"{name} cannot be read: {error.strerror}")
    return found


def set_aside(folder: Path) -> Path:
    """Rename a damaged checkpoint, so that it is looked at once and never taken for a sound one."""
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
    for old in checkpoints(run_dir)[:-keep]:
        if not keep_every or step_of(old) % keep_every:
            shutil.rmtree(old.rename(part_name(old)))
