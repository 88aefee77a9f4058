"""Tables of runs: the summary of one, the comparison of several, the samples of a step."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import rich.console
from rich.box import SIMPLE_HEAD
from rich.markup import escape
from rich.table import Table

from megatron_gpc.metrics.baseline import against
from megatron_gpc.metrics.drawn import CURVE_WIDTH, curve
from megatron_gpc.metrics.intervals import interval
from megatron_gpc.metrics.runs import (
    PLOT_NAME,
    Run,
    SeedGroup,
    Series,
    group_runs,
    load_run,
    paired,
)
from megatron_gpc.types import Sample


def summary_table(run_dir: Path) -> Table:
    """A run in a few rows: what happened to reward, entropy and diversity, and at what speed.

    Start and end are means over 5 % of the steps, at least one; the peak of entropy is that of the
    mean over as many steps.  Held-out rows are the first and the last evaluation, if there are any.
    A sentence compares the run with its baseline (log.baseline).  The picture is named once it lies
    in the run's folder.

    Raises:
        UserError: not a run directory, or a damaged one.
    """
    run = load_run(run_dir)
    reward, entropy = run.series("reward"), run.series("entropy")
    peak_step, peak = entropy.peak()
    table = _table(f"{run.schedule}, seed {run.seed}: {len(reward)} of {run.steps} steps")
    table.add_column("", overflow="fold")
    for heading in ("start", "peak", "end", "whole run"):
        table.add_column(heading, justify="right", overflow="fold")
    table.add_row("reward", _text(reward.first()), "", _text(reward.last()))
    table.add_row(
        "entropy, nats a token",
        _text(entropy.first()),
        f"{_text(peak)} (step {peak_step})" if peak_step else "-",
        _text(entropy.last()),
    )
    for name, title in (
        ("eval_reward", "held-out reward"),
        *((f"eval_pass_at_{k}", f"held-out pass@{k}") for k in _few_ks(run)),
        ("eval_distinct_right", "distinct right answers"),
    ):
        evaluations = run.series(name).values
        if len(evaluations):
            after = evaluations[-1] if len(evaluations) > 1 else math.nan
            table.add_row(title, _text(evaluations[0]), "", _text(after))
    table.add_section()
    for title, value in _whole_run(run).items():
        table.add_row(title, "", "", "", value)
    drawn = curve(entropy.values.tolist(), CURVE_WIDTH, rich.console.Console().options.ascii_only)
    table.caption = f"entropy: {drawn}"
    if sentence := against(run):
        table.caption += f"\n{escape(sentence)}"
    plot = run.folder / PLOT_NAME
    if plot.exists():
        table.caption += f"\nplots: {escape(min(str(plot), os.path.relpath(plot), key=len))}"
    return table


def _few_ks(run: Run) -> list[int]:
    """A middle and the last k of the pass@k that were measured."""
    names = (name for name in run.names() if name.startswith("eval_pass_at_"))
    ks = sorted(int(name.removeprefix("eval_pass_at_")) for name in names)
    return sorted({ks[len(ks) // 2], ks[-1]}) if ks else []


def _whole_run(run: Run) -> dict[str, str]:
    timed = [
        (
            line["tokens_per_second"],
            sum(line.get(f"seconds_{part}", 0.0) for part in ("rollout", "train", "sync")),
        )
        for line in run.lines
        if "tokens_per_second" in line
    ]
    seconds = sum(taken for _, taken in timed)
    tokens = sum(rate * taken for rate, taken in timed)
    rows = {
        f"clipped at {side} bound, %": _text(100 * run.series(f"clip_fraction_{name}").mean(), 2)
        for name, side in (("low", "lower"), ("high", "upper"))
    }
    if len(run.series("signal_share")):
        rows["signal share of the gradient"] = _text(run.series("signal_share").mean(), 2)
    if len(run.series("entropy_target")):
        rows |= _tracking(run)
    rows["tokens a second"] = _text(tokens / seconds if seconds else math.nan, 0)
    rows["time in steps"] = str(timedelta(seconds=round(seconds))) if 0 <= seconds < 1e12 else "-"
    return rows


def _tracking(run: Run) -> dict[str, str]:
    """How well entropy followed clip.target, and how often that was all the thresholds could do."""
    limits = np.abs(run.series("clip_lambda").known().values) >= 1
    at_limit = limits.mean() if len(limits) else math.nan
    return {
        "entropy's distance from target, nats": _text(target_distance(run)),
        "the same while lambda has room, nats": _text(target_distance(run, limit=1.0)),
        "steps at a limit of lambda, %": _text(100 * at_limit, 0),
    }


def target_distance(run: Run, limit: float = math.inf) -> float:
    """Of entropy from clip.target, root of the mean square [nats]; nan without one.

    Args:
        limit: as of `off_target`.
    """
    apart = off_target(run, limit).values
    return float(np.sqrt(np.mean(apart**2))) if len(apart) else math.nan


def off_target(run: Run, limit: float = math.inf) -> Series:
    """How far entropy was above clip.target [nats].

    Args:
        limit: only of steps at which |lambda| was below.
    """
    opened = run.series("clip_lambda")
    at_limit = opened.steps[np.abs(opened.values) >= limit]
    entropy, target, steps = paired(run.series("entropy"), run.series("entropy_target"))
    return Series(steps, entropy - target).where(~np.isin(steps, at_limit))


_COMPARED: Mapping[str, Callable[[Run], float]] = {
    "reward, end": lambda run: run.series("reward").last(),
    "entropy, start": lambda run: run.series("entropy").first(),
    "peak": lambda run: run.series("entropy").peak()[1],
    "mean": lambda run: run.series("entropy").mean(),
    "phase 1": lambda run: _phase_mean(run, first=True),
    "phase 2": lambda run: _phase_mean(run, first=False),
    "end": lambda run: run.series("entropy").last(),
    "from target": target_distance,
    "distinct right, end": lambda run: _last_evaluation(run.series("eval_distinct_right")),
}


def _phase_mean(run: Run, first: bool) -> float:
    """Mean of entropy before or after clip.phase_split of the run, the same steps for schedules
    without phases; nan if the run has none of them."""
    entropy = run.series("entropy")
    return entropy.where((entropy.steps <= run.split) == first).mean()


def _last_evaluation(series: Series) -> float:
    return float(series.values[-1]) if len(series) else math.nan


def compare_table(run_dirs: Sequence[Path]) -> Table:
    """Several runs, pooled over seeds, and how each group differs from the first.

    Numbers are mean ± standard deviation (n - 1) over seeds.  Start, peak and end of entropy are as
    in `summary_table`, phases 1 and 2 are its means before and after clip.phase_split of the run.
    Differences are taken seed by seed and only over seeds that both groups have, since what the
    seed decides (prompts, first samples) cancels; they are mean ± half of a 95 % interval of
    Student's t.

    Raises:
        UserError: not a run directory, or a damaged one.
    """
    first, *others = group_runs([load_run(run_dir) for run_dir in run_dirs])
    table = _table(
        "mean ± standard deviation over seeds; below, seed by seed, ± half a 95 % interval"
    )
    table.add_column("runs")
    for heading in ("seeds", *_COMPARED):
        table.add_column(heading, justify="right")
    for group in (first, *others):
        columns = [[of_run(run) for run in group.runs] for of_run in _COMPARED.values()]
        table.add_row(escape(group.label), str(len(group.runs)), *map(_mean_and_spread, columns))
    table.add_section()
    for group in others:
        seeds, columns = _paired_differences(first, group)
        if seeds:
            table.add_row(
                escape(f"{group.label} - {first.label}"),
                f"{len(seeds)} paired",
                *(str(interval(column)) for column in columns),
            )
    return table


def _paired_differences(first: SeedGroup, other: SeedGroup) -> tuple[list[int], list[list[float]]]:
    """Seeds that both groups have, and for every compared number other - first, seed by seed."""
    of_first = {run.seed: run for run in first.runs}
    of_other = {run.seed: run for run in other.runs}
    seeds = sorted(of_first.keys() & of_other.keys())
    return seeds, [
        [number(of_other[seed]) - number(of_first[seed]) for seed in seeds]
        for number in _COMPARED.values()
    ]


def samples_table(step: int, rows: Sequence[tuple[Sample, float]], of: int) -> Table:
    """Saved samples with their advantages, as they were trained on.

    Args:
        rows: (sample, advantage), those to show.
        of: how many there were to choose from.
    """
    shown = f"{len(rows)} of {of} samples" if len(rows) < of else f"{of} samples"
    table = _table(f"step {step}: {shown}")
    table.add_column("prompt", overflow="fold")
    table.add_column("#", justify="right")
    table.add_column("response", overflow="fold")
    for heading in ("tokens", "reward", "advantage", "mean log-prob"):
        table.add_column(heading, justify="right")
    table.add_column("weights")
    table.add_column("ended by")
    for sample, advantage in rows:
        table.add_row(
            f"{sample.prompt.index} {escape(repr(sample.prompt.text))}",
            str(sample.sample_index),
            escape(repr(sample.text)),
            str(len(sample.token_ids)),
            _text(sample.reward),
            _text(advantage),
            _text(float(np.mean(sample.logprobs))),
            " ".join(dict.fromkeys(version for version, _, _ in sample.weight_versions)),
            sample.finish_reason,
        )
    return table


def evaluation_table(found: Mapping[str, Any]) -> Table:
    """What evaluate.py found of a checkpoint."""
    table = _table(f"{found['checkpoint']}: {found['prompts']} prompts")
    table.add_column("", overflow="fold")
    table.add_column("", justify="right")
    table.add_row(f"mean@{found['samples']}", _text(found["mean"], 4))
    for k, value in found["pass"].items():
        table.add_row(f"pass@{k}", _text(value, 4))
    table.add_section()
    table.add_row("distinct right answers a prompt", _text(found["distinct_right"], 2))
    table.add_row("cut at the length limit, %", _text(100 * found["truncated"], 1))
    table.add_row("tokens a response", _text(found["mean_tokens"], 0))
    return table


def print_table(table: Table) -> None:
    """To standard output; a pipe or log, which has no width, gets the table as wide as it is."""
    console = rich.console.Console()
    if not console.is_terminal:
        console = rich.console.Console(width=1000)  # a limit: tables are as wide as they need
    console.print(table)


def _table(title: str) -> Table:
    return Table(
        title=title,
        title_justify="left",
        title_style="bold",
        caption_justify="left",
        caption_style="",
        box=SIMPLE_HEAD,
    )


def _mean_and_spread(values: Sequence[float]) -> str:
    known = np.array(values)[~np.isnan(values)]
    if not len(known):
        return "-"
    spread = f" ± {_text(known.std(ddof=1))}" if len(known) > 1 else ""
    return _text(known.mean()) + spread


def _text(value: float, digits: int = 3) -> str:
    return f"{value:,.{digits}f}" if math.isfinite(value) else "-"
