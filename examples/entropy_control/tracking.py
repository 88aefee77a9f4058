"""How closely entropy follows a drawn curve: three curves on three tasks, over seeds.

    python examples/entropy_control/tracking.py [--seeds 20 21 22 23 24] [--tasks exploration]
        [--curves waves] [--report] [--jobs 2] [--out FOLDER] [key=value ...]

Runs go side by side, one process each.  A run that is finished is not made again; one that was
interrupted continues.  They lie in runs/tracking/TASK-CURVE-SEED; report.md and a picture of each
task beside them.  With --report no run is made: the report is of those that are finished.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from itertools import product
from pathlib import Path

import numpy as np

sys.path += [str(Path(__file__).parents[1] / name) for name in ("", "entropy_study")]
from arms import PARTS  # noqa: E402
from comparison import Arm, comparison_parser, run_comparison, written  # noqa: E402
from findings import Seed, draw_over_steps, in_all, markdown_table, over  # noqa: E402

from megatron_gpc.metrics.intervals import interval  # noqa: E402
from megatron_gpc.metrics.runs import Run  # noqa: E402
from megatron_gpc.metrics.tables import off_target, target_distance  # noqa: E402

EXAMPLES = Path(__file__).parents[1]
OUT = EXAMPLES.parent / "runs" / "tracking"
TASKS = {
    "control": (
        EXAMPLES / "entropy_control" / "config.yaml",
        ("parallel.tp=1", "parallel.pp=1", "log.baseline=null"),
    ),
    "exploration": (
        EXAMPLES / "exploration" / "config.yaml",
        ("train.steps=60", "optim.lr=5e-4"),
    ),
    "sums": (  # nine of ten rewards are coins: else learning decides where entropy goes
        PARTS["noise"].config,
        (*PARTS["noise"].common, "data.verifier_arguments.share=0.9"),
    ),
}
CURVES = {
    "hill": "[[0,100%],[0.5,110%],[1,75%]]",
    "waves": "[[0,100%],[0.33,88%],[0.67,104%],[1,80%]]",
    "line": "[[0,100%],[1,70%]]",
}
ARMS = {f"{task}-{curve}": (task, curve) for task, curve in product(TASKS, CURVES)}


NEEDED = ("entropy", "entropy_target", "clip_lambda")


def main() -> int:
    parser = comparison_parser(__doc__, range(20, 25), OUT)
    parser.add_argument("--tasks", choices=TASKS, nargs="+", default=list(TASKS))
    parser.add_argument("--curves", choices=CURVES, nargs="+", default=list(CURVES))
    return run_comparison(parser, arms_of, written(report), NEEDED)


def arms_of(given: argparse.Namespace) -> dict[str, Arm]:
    arms = {}
    for task, curve in product(given.tasks, given.curves):
        file, common = TASKS[task]
        common = (*common, "plots=false", "eval.prompts=null")
        own = ("clip.schedule=target", f"clip.target={CURVES[curve]}")
        arms[f"{task}-{curve}"] = Arm(file, common, own)
    return arms


def span(run: Run) -> float:
    """Of the curve [nats]; nan of one that is level, of which no distance is a share."""
    return float(np.ptp(run.series("entropy_target").known().values)) or np.nan


def percent_of_range(run: Run, limit: float = np.inf) -> float:
    """Root of the mean square of entropy's distance from the curve, in percent of what the curve
    spans; `limit` as of `target_distance`."""
    return 100 * target_distance(run, limit) / span(run)


def percent_of_mean(runs: Sequence[Run]) -> float:
    """As `percent_of_range` with room, but of entropy averaged over the runs: less of the noise."""
    apart: dict[int, list[float]] = {}
    for run in runs:
        off = off_target(run, limit=1.0)
        for step, value in zip(off.steps.tolist(), off.values / span(run), strict=True):
            apart.setdefault(step, []).append(value)
    squares = [np.mean(values) ** 2 for values in apart.values()]
    return 100 * float(np.sqrt(np.mean(squares))) if squares else np.nan


def with_room(run: Run) -> float:
    """Percent of the steps at which lambda was within its limits."""
    return 100 * float(np.mean(np.abs(run.series("clip_lambda").known().values) < 1))


def report(seeds: Sequence[Seed], out: Path) -> str:
    """Markdown, and its pictures in `out`."""
    there = in_all(seeds, list(ARMS))
    numbers = (
        *(span, target_distance, percent_of_range),
        *(lambda run: percent_of_range(run, limit=1.0), with_room),
    )
    runs = {arm: [seed[arm] for seed in seeds if arm in seed] for arm in there}
    rows = [
        (
            *(*ARMS[arm], len(runs[arm]), *(over(seeds, arm, n) for n in numbers)),
            interval([percent_of_mean(runs[arm])]),
        )
        for arm in there
    ]
    pictures = []
    for task in dict.fromkeys(ARMS[arm][0] for arm in there):
        arms = [arm for arm in there if ARMS[arm][0] == task]
        titles = {arm: f"{ARMS[arm][1]} {CURVES[ARMS[arm][1]]}" for arm in arms}
        panels = {"entropy": "entropy [nats a token]", "clip_lambda": "lambda"}
        draw_over_steps(seeds, titles, arms, panels, out / f"{task}.png")
        pictures.append(f"![{task}]({task}.png)")
    headings = (
        *("task", "curve", "seeds", "range, nats", "distance, nats", "distance, % of range"),
        *("with room, % of range", "steps with room, %", "mean of seeds, with room, % of range"),
    )
    return "\n\n".join(
        [
            "# How closely entropy follows a curve",
            "Distance: root of the mean square of entropy's distance from its target, over a run's "
            "steps; *with room*: over those at which lambda was within its limits. Means over "
            "seeds ± half a 95 % interval (Student's t). Last column: the distance with room "
            "after entropy was averaged over seeds, which leaves less of the noise.",
            markdown_table(headings, rows),
            *pictures,
        ]
    )


if __name__ == "__main__":
    sys.exit(main())
