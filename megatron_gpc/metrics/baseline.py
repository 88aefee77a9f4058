"""A record of other runs, and one sentence of how a run differs from them: `log.baseline`."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron_gpc.errors import UserError
from megatron_gpc.metrics.runs import Run, group_runs, load_run
from megatron_gpc.run.files import read_json, write_output

BASELINE_KEY = "log.baseline"
_NUMBERS: Mapping[str, Callable[[Run], float]] = {
    "entropy over the run": lambda run: run.series("entropy").mean(),
    "entropy at its end": lambda run: run.series("entropy").last(),
    "reward at its end": lambda run: run.series("reward").last(),
}
_DECIDES = ("model.", "data.", "rollout.", "train.", "optim.", "kl.")
"""Sections that a run has to share with its baseline ..."""
_BUT_FOR = (
    *("model.build", "data.verifier_timeout_s", "rollout.server.", "rollout.save_samples"),
    *("train.micro_batch_", "train.logit_chunk_tokens", "optim.distributed"),
)
"""... but for these, which change no number."""


@dataclass(frozen=True)
class Baseline:
    """Finished runs that differ in their seed alone."""

    label: str
    """Their schedule, and what else tells them apart."""
    config: Mapping[str, Any]
    """What of their configuration decides whether another run can be compared; dotted keys."""
    numbers: Mapping[str, Sequence[float]]
    """Each of `_NUMBERS`, a value a run."""


def record(run_dirs: Sequence[Path], out: Path) -> Path:
    """Write the baseline that some finished runs are; returns `out`.

    Raises:
        UserError: they are not all runs of one experiment, or one is not finished; or `out` cannot
            be written.
    """
    runs = [load_run(run_dir) for run_dir in run_dirs]
    groups = group_runs(runs)
    if len(groups) > 1:
        labels = " and ".join(group.label for group in groups)
        raise UserError(f"{out}: a baseline's runs differ in their seed alone, not {labels}")
    for run in runs:
        if not _is_finished(run):
            raise UserError(f"{run.folder}: has not made all its steps; no baseline")
    numbers = {name: [round(of(run), 5) for run in runs] for name, of in _NUMBERS.items()}
    found = Baseline(groups[0].label, _deciding(runs[0]), numbers)
    return write_output(out, json.dumps(asdict(found), indent=1) + "\n")


def read_baseline(file: Path) -> Baseline:
    """What `record` wrote.

    Raises:
        UserError: the file is missing or something else.
    """
    try:
        found = Baseline(**read_json(file))
        numbers = [found.numbers[name] for name in _NUMBERS]
        if isinstance(found.config, dict) and all(
            n and all(map(math.isfinite, n)) for n in numbers
        ):
            return found
    except FileNotFoundError:
        raise UserError(f"{BASELINE_KEY}: {file} is not there; name a record of runs") from None
    except UserError as error:
        raise UserError(f"{BASELINE_KEY}: {error}") from None
    except (ArithmeticError, TypeError, LookupError):
        pass
    raise UserError(f"{BASELINE_KEY}: {file} is no record of runs; see docs/runs.md")


def against(run: Run) -> str:
    """How a finished run differs from its baseline; nothing without one, or before its end."""
    file = run.config.get(BASELINE_KEY)
    if file is None or not _is_finished(run):
        return ""
    try:
        baseline = read_baseline(Path(file))
    except UserError:  # it was in order when the run began
        return ""
    mine = _deciding(run)
    for key, theirs in baseline.config.items():
        if key in mine and mine[key] != theirs:
            return (
                f"not compared with {baseline.label} ({Path(file).name}), whose {key} is {theirs} "
                f"and not {mine[key]}"
            )
    count = len(baseline.numbers["entropy over the run"])
    parts = [_part(name, of(run), baseline.numbers[name]) for name, of in _NUMBERS.items()]
    seeds = f"{count} recorded run" + "s" * (count > 1)
    return f"against {baseline.label} ({seeds}): {', '.join(parts)}"


def _part(name: str, mine: float, theirs: Sequence[float]) -> str:
    """`entropy over the run 0.170 higher (0.902; theirs 0.700 to 0.790)`."""
    difference = mine - math.fsum(theirs) / len(theirs)
    side = "higher" if difference >= 0 else "lower"
    return (
        f"{name} {abs(difference):.3f} {side} "
        f"({mine:.3f}; theirs {min(theirs):.3f} to {max(theirs):.3f})"
    )


def _is_finished(run: Run) -> bool:
    return run.steps in run.series("reward").steps


def _deciding(run: Run) -> dict[str, Any]:
    """What decides a run's numbers besides seed and thresholds; paths by their names, since they
    differ between machines."""
    return {
        key: Path(value).name if isinstance(value, str) and "/" in value else value
        for key, value in run.config.items()
        if key.startswith(_DECIDES) and not key.startswith(_BUT_FOR)
    }
