"""Writes and reads metrics.jsonl (an object for each step) and eval.jsonl (for each evaluation)."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from contextlib import nullcontext, suppress
from pathlib import Path
from types import NoneType
from typing import Any, TextIO

from megatron_gpc.errors import UserError
from megatron_gpc.run.files import MOST_JSON_BYTES, open_regular, replace_text

FILE_NAME = "metrics.jsonl"
EVAL_NAME = "eval.jsonl"
MOST = 1e300
"""Every number is less."""


class JsonlSink:
    """Appends to a run's metrics; one process of a run (rank 0) has one.

    A run that was killed has written steps beyond its last checkpoint.  They are about to be made
    again, so their lines are dropped first, and a last line that was only half written.

    Args:
        run_dir: the run's folder; made if it does not exist.
        resume_step: finished steps of the checkpoint that the run continues from.

    Raises:
        UserError: a file is there but damaged, other than by a half-written last line.
    """

    def __init__(self, run_dir: Path, config: Mapping[str, Any], resume_step: int):
        run_dir.mkdir(parents=True, exist_ok=True)
        # An evaluation after k steps comes before step k + 1, so resuming after k makes it again.
        self._steps = _open(run_dir / FILE_NAME, resume_step + 1)
        self._evaluations = _open(run_dir / EVAL_NAME, resume_step)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Append one object: `step`, then `values`, in full precision; on disk when this returns.

        JSON has no nan and no infinity: both become null (and `read_metrics` gives nan), and so
        does what cannot be added up or drawn.
        """
        _append(self._steps, step, values)

    def write_evaluation(self, step: int, values: Mapping[str, float]) -> None:
        """Append the evaluation of the policy after `step` finished steps, in the same way."""
        _append(self._evaluations, step, values)

    def close(self, ok: bool) -> None:
        # What could not be written is still waiting to be: after a failure, closing fails again.
        with nullcontext() if ok else suppress(OSError):
            self._steps.close()
        with nullcontext() if ok else suppress(OSError):
            self._evaluations.close()


def read_metrics(run_dir: Path, name: str = FILE_NAME) -> list[dict[str, float]]:
    """The objects of metrics.jsonl (or eval.jsonl) in the file's order; null is read as nan.

    A last line without its end is left out: the run is being written, or was killed.

    Raises:
        UserError: the file is missing, is no text, or a line is not a JSON object of numbers (or
            null) with a whole `step`.
    """
    return [
        {name: math.nan if value is None else value for name, value in content.items()}
        for _, content in _read(Path(run_dir) / name)
    ]


def _read(file: Path) -> list[tuple[str, dict[str, Any]]]:
    """Every complete line, as text and as its content."""
    try:
        with open_regular(file) as stream:
            if os.fstat(stream.fileno()).st_size > MOST_JSON_BYTES:
                raise UserError(f"{file}: too large for metrics; move it away")
            text = stream.read().decode()
    except FileNotFoundError:
        raise UserError(f"{file}: no such file; give the folder of a run (run_dir)") from None
    except UnicodeDecodeError:
        raise UserError(f"{file}: is not a text file; move it away, or restore it") from None
    except OSError as error:
        raise UserError(f"{file}: cannot be read: {error.strerror}") from None
    *lines, _half_written = text.split("\n")
    found = []
    for number, line in enumerate(lines, start=1):
        try:
            content = json.loads(line)
        except (ValueError, RecursionError):
            content = None
        if (
            not isinstance(content, dict)
            or type(content.get("step")) is not int
            or not 0 <= content["step"] < 2**53
        ):
            raise UserError(
                f"{file}, line {number}: not a JSON object with a step; mend or remove the line"
            )
        for name, value in content.items():
            if type(value) not in (int, float, NoneType) or (value and not abs(value) < MOST):
                raise UserError(
                    f"{file}, line {number}: {name} is {repr(value)[:60]}, not a number; mend or "
                    "remove the line"
                )
        found.append((line, content))
    return found


def _append(file: TextIO, step: int, values: Mapping[str, float]) -> None:
    assert "step" not in values
    finite = {name: value if abs(value) < MOST else None for name, value in values.items()}
    file.write(json.dumps({"step": step, **finite}, allow_nan=False) + "\n")
    file.flush()


def _open(file: Path, first_step: int) -> TextIO:
    """Ready for appending `first_step` and what follows."""
    if file.exists():
        _drop_from(file, first_step)
    return file.open("a", encoding="utf-8")


def _drop_from(file: Path, first_step: int) -> None:
    """Rewrite the file without steps >= first_step; a reader sees the old file or the new one."""
    kept = [line for line, content in _read(file) if content["step"] < first_step]
    replace_text(file, "".join(line + "\n" for line in kept))
