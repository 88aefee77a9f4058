"""Files that a reader sees whole, and checksums that tell whether they still are."""

from __future__ import annotations

import hashlib
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

SUMS = "SHA256SUMS"
LAST = "metadata.json"
"""The last line of SHA256SUMS, which is sorted: without it the file was cut."""


def replace_text(file: Path, text: str) -> None:
    """Write `FILE.part`, UTF-8, then rename it: no reader, and no crash, sees half of it.

    Raises:
        OSError: it cannot be written; the old file is as it was.
    """
    part = file.with_name(file.name + ".part")
    part.write_text(text, encoding="utf-8")
    part.replace(file)


def sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def problems(folder: Path, share: int, shares: int) -> list[str]:
    """What is wrong with this share of a checkpoint's files; empty if nothing is.

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


def problems_of_all(folder: Path) -> list[str]:
    """What is wrong with any of a checkpoint's files; reads them on all of the machine's cores."""
    shares = os.cpu_count() or 1
    with ThreadPoolExecutor(shares) as threads:
        parts = threads.map(lambda share: problems(folder, share, shares), range(shares))
        return list(dict.fromkeys(problem for part in parts for problem in part))
