"""How a run is doing, read from its folder alone: `megatron-gpc status RUN`."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any, NamedTuple

from megatron_gpc.config.plain_yaml import read_mapping
from megatron_gpc.config.types import MOST
from megatron_gpc.errors import UserError
from megatron_gpc.metrics.jsonl import FILE_NAME, read_metrics
from megatron_gpc.run.files import by_step, read_json
from megatron_gpc.run.lock import last_start, life
from megatron_gpc.run.stop import marker

SPARE_S = 60.0
"""What is added to step and checkpoint before a time limit [s]."""


def status_lines(run_dir: Path, lead_s: float | None) -> list[str]:
    """What to say of a run.

    Args:
        run_dir: its folder.
        lead_s: how long before its time limit the run is asked to end, to be held against what a
            step and a checkpoint take [s].

    Raises:
        UserError: it is no run's folder.
    """
    file, checkpoints = run_dir / "config.yaml", run_dir / "checkpoints"
    started = last_start(run_dir)
    if not file.exists() and started:  # the lock is the first thing in a run's folder
        return [f"{run_dir}: no step yet", life(run_dir)]
    try:
        config = read_mapping(file)
        steps = int(config["train"]["steps"])
        if not 0 < steps <= MOST:
            raise ValueError("train.steps cannot be")
        _ = config["run_dir"], config["model"]["hf"]  # which a resolved configuration has
    except (UserError, ArithmeticError, ValueError, LookupError, TypeError) as error:
        raise UserError(
            f"{run_dir}: not the folder of a run: config.yaml: "
            f"{type(error).__name__}: {error!s:.300}"
        ) from None
    metrics = run_dir / FILE_NAME
    begun = metrics.exists() or checkpoints.exists() or started
    if not begun:
        raise UserError(
            f"{run_dir}: not the folder of a run: none has begun here; runs of its config.yaml are "
            f"in the folder that run_dir there names, {config['run_dir']}"
        )
    records = read_metrics(run_dir) if metrics.exists() else []
    done = records[-1]["step"] if records else 0
    lines = [f"{run_dir}: step {done} of {steps}"]
    if records:
        seconds = sorted(_seconds(record) for record in records)
        median = seconds[len(seconds) // 2]
        age = time.time() - metrics.stat().st_mtime
        lines[0] += (
            f", {median:.1f} s a step (longest {seconds[-1]:.1f}), "
            f"{(steps - done) * median / 3600:.2f} h to go, last step {age:.0f} s ago"
        )
    lines.append(life(run_dir))
    error = _first_error(run_dir)
    if error and error.time >= started:
        lines.append(f"ended by an error: {error.words}; --traceback shows where")
    saved = [one.name for one in by_step(checkpoints).values()]
    lines.append(f"newest checkpoint: {saved[-1] if saved else 'none'}")
    damaged = sorted(checkpoints.glob("step_*.damaged*"))
    lines += [f"damaged, set aside: {one.name}" for one in damaged]
    if marker(run_dir).exists():
        lines.append("was asked to end, and did; the same command continues it")
    if lead_s is not None and records:
        lines.append(_lead(records, lead_s))
    return lines


def first_traceback(run_dir: Path) -> str:
    """What the rank that failed first left in the run's logs; also of attempts before this one.

    Raises:
        UserError: none did.
    """
    error = _first_error(run_dir)
    if error is None:
        raise UserError(f"{run_dir}: no rank left a traceback")
    return f"{error.file}:\n{error.calls}"


class _RankError(NamedTuple):
    """What a rank wrote down when it failed."""

    time: float
    """[s since 1970]"""
    file: Path
    words: str
    calls: str


def _first_error(run_dir: Path) -> _RankError | None:
    """The first of the newest attempt that failed; None if none left word."""
    found: list[_RankError] = []
    for file in run_dir.rglob("rank_*.error.json"):
        try:
            message = read_json(file)["message"]
            more = message["extraInfo"]
            words = str(message["message"]).partition("\n")[0]
            found.append(
                _RankError(float(more["timestamp"]), file, words, str(more["py_callstack"]))
            )
        except (OSError, UserError, LookupError, TypeError, ValueError, OverflowError):
            continue  # the rank was killed while it wrote
    newest = max(found, default=None)
    return newest and min(one for one in found if one.file.parent == newest.file.parent)


def _seconds(record: dict[str, Any]) -> float:
    return sum(value for name, value in record.items() if name.startswith("seconds_"))


def _lead(records: list[dict[str, Any]], lead_s: float) -> str:
    saves = [record.get("seconds_checkpoint", 0.0) for record in records]
    step = max(_seconds(record) - save for record, save in zip(records, saves, strict=True))
    save = max(saves)
    needed = step + save + SPARE_S
    verdict = "enough" if needed <= lead_s else "NOT ENOUGH: raise T in --signal=B:USR1@T"
    return (
        f"asked to end {lead_s:g} s ahead of the limit; longest step {step:.0f} s + checkpoint "
        f"{save:.0f} s + {SPARE_S:g} s = {needed:.0f} s: {verdict}"
    )
