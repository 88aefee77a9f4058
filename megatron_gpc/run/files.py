"""Files that a reader sees whole, checksums that tell whether they still are, JSON with limits."""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import re
import secrets
import stat
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from io import BufferedReader
from pathlib import Path
from typing import Any

from megatron_gpc.errors import UserError

SUMS = "SHA256SUMS"
LAST = "metadata.json"
"""The last line of SHA256SUMS, which is sorted: without it the file was cut."""

MOST_JSON_BYTES = 2**28
"""Largest JSON file that is read."""

_OF_A_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO, errno.ESTALE)


def check_regular(file: Path) -> None:
    """Refuse what is there and no regular file: a pipe or a device would be waited for.

    Raises:
        UserError: says what it is.
    """
    try:
        is_folder, is_there, is_file = file.is_dir(), file.exists(), file.is_file()
    except (OSError, ValueError) as error:  # a name that is too long, or half of a surrogate pair
        raise UserError(f"{str(file)!r:.300} cannot be a file's name: {error!s:.60}") from None
    if is_folder:
        raise UserError(f"{file} is a folder; name a file")
    if is_there and not is_file:
        raise UserError(f"{file} is no regular file; name one")


def check_new(name: str, file: Path) -> None:
    """Refuse to write over what is there.

    Args:
        name: what the user calls the file, such as --out.

    Raises:
        UserError: something has that name, if only a link to nothing; or nothing can have it.
    """
    check_regular(file)
    if file.exists() or file.is_symlink():
        raise UserError(f"{name}: {file} exists already; name another file, or remove it first")


def read_json(file: Path) -> dict[str, Any]:
    """The object that a JSON file holds.

    Raises:
        FileNotFoundError: it is not there.
        UserError: it is no regular file, too large, not UTF-8, not JSON, nested too deeply, or
            something else than an object.
    """
    check_regular(file)
    try:
        if file.stat().st_size > MOST_JSON_BYTES:
            raise UserError(f"{file}: too large for JSON; put the right file there")
        return parse_json(file.read_bytes(), str(file))
    except FileNotFoundError:
        raise
    except OSError as error:
        raise UserError(f"{file}: cannot be read: {error.strerror}") from None


def parse_json(text: bytes | str, where: str) -> dict[str, Any]:
    """The object that is written there as JSON.

    Args:
        where: what to blame.

    Raises:
        UserError: not UTF-8, not JSON, nested too deeply, or no object.
    """
    try:
        content = json.loads(text, object_pairs_hook=_unequal)
    except (ValueError, RecursionError) as error:  # a number of 5000 digits is a ValueError too
        raise UserError(f"{where}: cannot be read as JSON: {error}; put it right") from None
    if not isinstance(content, dict):
        raise UserError(f"{where}: expected a JSON object, not {type(content).__name__}")
    return content


def strict_json(text: str) -> Any:
    """What is written there as JSON, without what Python takes beside: NaN and Infinity.

    Raises:
        ValueError, RecursionError: not that; or a key is given twice, or a number is too large.
    """
    return json.loads(text, object_pairs_hook=_unequal, parse_float=_finite, parse_constant=_finite)


def _unequal(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"{twice!r:.80} is given twice")
    return found


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text[:40]} is no finite number")
    return value


def name_of_step(step: int) -> str:
    """`step_000120`."""
    return f"step_{step:06d}"


def by_step(folder: Path, suffix: str = "") -> dict[int, Path]:
    """What a folder has of steps, ascending: `step_000120` with the suffix; other names, such as
    `step_000120.part`, are left out."""
    pattern = re.compile(f"step_([0-9]{{1,18}}){re.escape(suffix)}")
    found = ((pattern.fullmatch(path.name), path) for path in folder.glob("step_*"))
    return dict(sorted((int(name[1]), path) for name, path in found if name))


@contextmanager
def replacing(file: Path, mode: int = 0o666) -> Iterator[Path]:
    """A new file beside it, to be written; then it is renamed: no reader, and no crash, sees half.

    If the block fails, the old file is as it was.  A link of that name is replaced, not followed.

    Args:
        mode: of the new file, less the umask.
    """
    part = file.with_name(f".{file.name[:200]}.{secrets.token_hex(4)}")
    try:
        os.close(os.open(part, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, mode))
        yield part
        part.replace(file)
    finally:
        with suppress(OSError):  # of an error the first one counts; else there is nothing to remove
            part.unlink()


def replace_text(file: Path, text: str, mode: int = 0o666) -> None:
    """`replacing`, with UTF-8.

    Raises:
        OSError: it cannot be written.
    """
    with replacing(file, mode) as part:
        part.write_text(text, encoding="utf-8")


def write_output(file: Path, text: str, mode: int = 0o666) -> Path:
    """`replace_text`, in a folder that is made if it is missing; returns the file.

    Raises:
        UserError: it cannot be written.
    """
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        replace_text(file, text, mode)
    except OSError as error:
        raise UserError(f"{file}: cannot be written: {error.strerror}") from None
    return file


def disk_problem(error: OSError, folder: Path) -> str | None:
    """`/runs/a/lock: No space left on device` if that is what keeps a folder from being written;
    None if the error is about something else."""
    named = error.filename if isinstance(error.filename, str) else ""
    where = named if Path(named).is_relative_to(folder) else ""
    if not where and error.errno not in _OF_A_DISK:
        return None
    return f"{where or folder}: {error.strerror}"


def open_regular(file: Path) -> BufferedReader:
    """Open it to read.

    Raises:
        OSError: it cannot be, or is no regular file: a pipe would be waited for.
    """
    if not file.is_dir() and not stat.S_ISREG(file.stat().st_mode):
        raise OSError(errno.EINVAL, "Not a regular file", str(file))
    return file.open("rb")


def sha256(file: Path) -> str:
    with open_regular(file) as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def is_as_written(folder: Path, name: str) -> bool:
    """Whether a checkpoint's file has the checksum that was written with it."""
    try:
        return f"{sha256(folder / name)}  {name}" in (folder / SUMS).read_text().splitlines()
    except (OSError, ValueError):
        return False


def problems(folder: Path, share: int, shares: int) -> list[str]:
    """What is wrong with this share of a checkpoint's files; empty if nothing is.

    Args:
        share: which one, 0 <= share < shares; all of them together see every file.
    """
    try:
        with open_regular(folder / SUMS) as stream:
            lines = [line.split("  ", 1) for line in stream.read().decode().splitlines()]
    except FileNotFoundError:
        return [f"{SUMS} is missing"]
    except (OSError, UnicodeDecodeError) as error:
        return [f"{SUMS} cannot be read: {error}"]
    if not lines or lines[-1][-1] != LAST or any(len(line) != 2 for line in lines):
        return [f"{SUMS} is cut short or overwritten"]
    read = {path.name for path in folder.glob("*.distcp")} | {".metadata", "common.pt"}
    unlisted = sorted(read - {name for _, name in lines})
    found = [f"{SUMS} does not list {name}" for name in unlisted if (folder / name).exists()]
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
