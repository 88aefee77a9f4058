"""A run directory read back: configuration, series over steps, runs grouped over their seeds.

Read from metrics.jsonl and config.yaml alone, and the latter without checking it against today's
keys, so that runs of other versions can still be drawn.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron_gpc.config.file import flatten
from megatron_gpc.config.parts import short
from megatron_gpc.config.plain_yaml import read_mapping
from megatron_gpc.errors import UserError
from megatron_gpc.metrics.jsonl import EVAL_NAME, read_metrics

PLOT_NAME = "plots.png"
"""Where a run's own picture lies in its folder."""

# Differences in these do not make another experiment: where a run lies, what it talks to, what it
# keeps, what it measures of itself.  The schedule heads the label by itself.
_NOT_IN_LABEL = ("run_dir", "resume", "timeout_s", "seed", "clip.schedule")
_NOT_IN_LABEL_SECTIONS = ("rollout.server.", "checkpoint.", "guard.", "diagnostics.")


@dataclass(frozen=True)
class Series:
    """One metric of a run: the steps that have it and its values, both [steps]; nan for null."""

    steps: np.ndarray
    values: np.ndarray

    def __len__(self) -> int:
        return len(self.steps)

    @property
    def window(self) -> int:
        """Steps that are averaged to see through the noise: 5 % of them, at least one."""
        return max(1, len(self) // 20)

    def where(self, chosen: np.ndarray) -> Series:
        """Without the steps that a boolean array [steps] leaves out."""
        return Series(self.steps[chosen], self.values[chosen])

    def known(self) -> Series:
        """Without the steps whose value is nan."""
        return self.where(~np.isnan(self.values))

    def mean(self) -> float:
        """Mean over all steps; nan for an empty series."""
        return _mean(self.values)

    def first(self) -> float:
        """Mean of the first 5 % of steps; nan for an empty series."""
        return _mean(self.values[: self.window])

    def last(self) -> float:
        """Mean of the last 5 % of steps; nan for an empty series."""
        return _mean(self.values[-self.window :])

    def smooth(self) -> Series:
        """Mean over a window of 5 % of the steps around each step, narrower at both ends."""
        before, after = (self.window - 1) // 2, self.window // 2
        means = [_mean(self.values[max(0, i - before) : i + after + 1]) for i in range(len(self))]
        return Series(self.steps, np.array(means))

    def peak(self) -> tuple[int, float]:
        """Step and value of the smoothed series' maximum; (0, nan) if there is none.

        Smoothed, because the largest of many noisy values says more about the noise.
        """
        smooth = self.smooth().values
        if np.isnan(smooth).all():
            return 0, float("nan")
        highest = int(np.nanargmax(smooth))
        return int(self.steps[highest]), float(smooth[highest])


def _mean(values: np.ndarray) -> float:
    """Mean of the values that are not nan; nan if there are none."""
    known = values[~np.isnan(values)]
    return float(known.mean()) if len(known) else float("nan")


def paired(one: Series, other: Series) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Values of two metrics at the steps at which both are known, and these steps."""
    one, other = one.known(), other.known()
    steps, here, there = np.intersect1d(one.steps, other.steps, return_indices=True)
    return one.values[here], other.values[there], steps


def correlation(one: Series, other: Series) -> float:
    """Pearson's r of two metrics over steps; nan for fewer than 3 steps or a constant metric."""
    x, y, _ = paired(one, other)
    if len(x) < 3 or x.std() == 0 or y.std() == 0:
        return float("nan")
    return float(np.corrcoef(x, y)[0, 1])


@dataclass(frozen=True)
class Run:
    """A run directory.  `config` has dotted keys: {"clip.schedule": "id", "train.steps": 100}."""

    folder: Path
    config: Mapping[str, Any]
    lines: Sequence[Mapping[str, float]]

    def series(self, name: str) -> Series:
        """One metric over the steps that have it (evaluations are on few lines)."""
        having = [line for line in self.lines if name in line]
        return Series(
            np.array([line["step"] for line in having], dtype=int),
            np.array([line[name] for line in having], dtype=float),
        )

    def names(self) -> list[str]:
        """Every metric that any line has, in order of appearance."""
        return list(dict.fromkeys(name for line in self.lines for name in line))

    @property
    def seed(self) -> int:
        return self.config["seed"]

    @property
    def schedule(self) -> str:
        """A built-in schedule's name; that of a user's own without the folder of its file."""
        return short(self.config["clip.schedule"])

    @property
    def steps(self) -> int:
        """Steps the run was to have, not those it made."""
        return self.config["train.steps"]

    @property
    def split(self) -> float:
        """The step that divides the run at clip.phase_split, whether or not it has phases."""
        return self.config["clip.phase_split"] * self.steps

    @property
    def phase_boundary(self) -> float | None:
        """The step at which `id` and `did` pass into phase 2; other schedules have no phases."""
        has_phases = self.schedule in ("id", "did")
        return self.split if has_phases else None


def load_run(folder: Path) -> Run:
    """Read a run directory.

    Raises:
        UserError: it is a file; metrics.jsonl or config.yaml is missing or damaged, or the latter
            lacks a key that drawing needs.
    """
    folder = Path(folder)
    if folder.is_file():
        raise UserError(f"{folder} is a file; give the folder of a run, {folder.parent}")
    lines = read_metrics(folder)
    if (folder / EVAL_NAME).exists():
        lines = sorted(lines + read_metrics(folder, EVAL_NAME), key=lambda line: line["step"])
    file = folder / "config.yaml"
    if not file.exists():
        raise UserError(f"{file}: no such file; give the folder of a run (run_dir)")
    config = flatten(read_mapping(file))
    for key, kind in (
        ("seed", int),
        ("clip.schedule", str),
        ("train.steps", int),
        ("clip.phase_split", float),
    ):
        value = config.get(key)
        if not isinstance(value, kind) or (not isinstance(value, str) and not 0 <= value < 2**63):
            raise UserError(
                f"{file}: {key} is missing or no {kind.__name__}; a run's resolved "
                "configuration has it"
            )
    return Run(folder, config, lines)


@dataclass(frozen=True)
class SeedGroup:
    """Runs that differ in their seed alone."""

    label: str
    runs: Sequence[Run]

    def mean_over_seeds(self, name: str) -> tuple[Series, Series]:
        """Mean and standard deviation (n - 1) of a metric over the runs, each run smoothed first.

        Only over steps that every run has: a mean whose members change half-way has a jump that no
        run made.  The deviation of a single run is nan.
        """
        series = [run.series(name).smooth() for run in self.runs]
        common = sorted(set.intersection(*(set(one.steps.tolist()) for one in series)))
        rows = np.array([one.values[np.searchsorted(one.steps, common)] for one in series])
        steps = np.array(common, dtype=int)
        spread = rows.std(axis=0, ddof=1) if len(rows) > 1 else np.full(len(steps), np.nan)
        return Series(steps, rows.mean(axis=0)), Series(steps, spread)


def group_runs(runs: Sequence[Run]) -> list[SeedGroup]:
    """Pool runs whose configurations differ in the seed alone, in order of first appearance.

    A label is the schedule and whatever else the given runs differ in: `static eps_high=0.28`.
    """
    keys = list(dict.fromkeys(key for run in runs for key in run.config))
    differing = [
        key
        for key in keys
        if key not in _NOT_IN_LABEL
        and not key.startswith(_NOT_IN_LABEL_SECTIONS)
        and len({repr(run.config.get(key)) for run in runs if _reads(run, key)}) > 1
    ]
    texts = {key: _value_texts([run.config.get(key) for run in runs]) for key in differing}
    heads = {name: short(name) for name in (run.config["clip.schedule"] for run in runs)}
    pooled: dict[str, list[Run]] = {}
    for number, run in enumerate(runs):
        parts = [
            f"{_short(key, differing)}={texts[key][number]}"
            for key in differing
            if _reads(run, key)
        ]
        name = run.config["clip.schedule"]
        head = heads[name] if list(heads.values()).count(heads[name]) == 1 else name
        pooled.setdefault(" ".join([head, *parts]), []).append(run)
    return [SeedGroup(label, members) for label, members in pooled.items()]


def _reads(run: Run, key: str) -> bool:
    """Whether the run's schedule reads a key: only `target` reads clip.target and its gains."""
    return not key.startswith("clip.target") or run.config["clip.schedule"] == "target"


def _short(key: str, keys: Sequence[str]) -> str:
    """The key without its sections, if no other of `keys` ends in the same."""
    last = key.rsplit(".", 1)[-1]
    return last if [one.rsplit(".", 1)[-1] for one in keys].count(last) == 1 else key


def _value_texts(values: Sequence[Any]) -> list[str]:
    """Values as text; absolute paths without the folder that they share."""
    if all(isinstance(value, str) and os.path.isabs(value) for value in values):
        shared = os.path.commonpath(values)
        return [os.path.relpath(value, shared) for value in values]
    return [str(value) for value in values]
