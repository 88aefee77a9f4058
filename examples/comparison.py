"""What scripts that compare runs over seeds share: options, the plan, and how they end."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from findings import Seed
from side_by_side import Planned, finished_run, make_runs

from megatron_gpc.cli import Parser, exit_code
from megatron_gpc.commands.arguments import number
from megatron_gpc.config.file import load
from megatron_gpc.errors import UserError
from megatron_gpc.metrics.jsonl import FILE_NAME
from megatron_gpc.metrics.plots import plot_runs
from megatron_gpc.metrics.tables import compare_table, print_table
from megatron_gpc.run.files import write_output

OF_EVERY_RUN = ("seed", "run_dir")
NO_NAME = ("train.steps",)
"""Keys that an arm may set and an override may set otherwise: they do not make it another arm."""


@dataclass(frozen=True)
class Arm:
    """Runs that differ in their seed alone."""

    file: Path
    """Their configuration file."""
    common: Sequence[str]
    """Overrides that it shares with other arms, and that the user's come after."""
    own: Sequence[str]
    """Overrides that make it what it is called."""


def comparison_parser(doc: str, seeds: Sequence[int], out: Path) -> argparse.ArgumentParser:
    """--seeds, --jobs, --out, --report and key=value, which all comparisons take."""
    parser = Parser(description=doc.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", action=Once, default=list(seeds))
    parser.add_argument(
        "--jobs", type=number(int, 1), default=os.cpu_count() or 1, help="runs at a time"
    )
    parser.add_argument("--out", type=_folder, default=out)
    parser.add_argument("--report", action="store_true", help="make no run")
    parser.add_argument("overrides", nargs="*", default=[], metavar="key=value")
    return parser


class Once(argparse.Action):
    """Keeps the first of equal values: a seed that counts twice would narrow the intervals."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option: Any = None) -> None:
        setattr(namespace, self.dest, list(dict.fromkeys(values)))


def _folder(text: str) -> Path:
    path = Path(text)
    if path.exists() and not path.is_dir():
        raise argparse.ArgumentTypeError(f"{text} is a file; name a folder")
    return path


def run_comparison(
    parser: argparse.ArgumentParser,
    arms_of: Callable[[argparse.Namespace], Mapping[str, Arm]],
    report: Callable[[Sequence[Seed], argparse.Namespace], str],
    needed: Sequence[str] = ("entropy",),
) -> int:
    """Be the script: make the runs (with --report none), print what `report` makes of those that
    are finished, and return the exit code.

    Args:
        arms_of: the arms that the arguments ask for, by name.
        report: raises UserError if a file cannot be written.
        needed: metrics without which a run cannot be reported on.
    """

    def work() -> int:
        given = parser.parse_intermixed_args()
        planned = plan(arms_of(given), given)
        if not given.report:
            make_runs(planned, given.jobs)
        print(report(finished_runs(planned, needed), given))
        return 0

    return exit_code(work)


def plan(arms: Mapping[str, Arm], given: argparse.Namespace) -> list[Planned]:
    """Every arm's run of every seed, OUT/ARM-SEED.

    Raises:
        UserError: an override cannot be used, or would make a run another one than its name says.
    """
    fixed = [key for arm in arms.values() for key in map(_key, arm.own) if key not in NO_NAME]
    for override in given.overrides:
        for key in (*OF_EVERY_RUN, *fixed):
            if f"{key}.".startswith(f"{_key(override)}."):
                raise UserError(
                    f"override {override!r}: the comparison itself sets {key}, and its runs are "
                    "named for it; --help says how to choose them"
                )
    planned = []
    for seed in given.seeds:
        for name, arm in arms.items():
            own = (f"seed={seed}", f"run_dir={given.out / f'{name}-{seed}'}")
            overrides = (*arm.common, *arm.own, *given.overrides, *own)
            planned.append(Planned(name, seed, arm.file, overrides, load(arm.file, overrides)))
    return planned


def _key(override: str) -> str:
    return override.partition("=")[0]


def finished_runs(planned: Sequence[Planned], needed: Sequence[str]) -> list[Seed]:
    """The runs that have all their steps, by seed; at least one.

    Args:
        needed: metrics that each must have.

    Raises:
        UserError: there is none, or one is of another configuration, damaged, or without a metric.
    """
    finished: dict[int, dict[str, Any]] = {}
    for one in planned:
        if (run := finished_run(one)) is None:
            continue
        for name in needed:
            if not len(run.series(name).known()):
                raise UserError(
                    f"{run.folder / FILE_NAME} has no {name}; remove the folder to make the run "
                    "again"
                )
        finished.setdefault(one.seed, {})[one.arm] = run
    if not finished:
        raise UserError(f"{planned[0].config.run_dir.parent}: no run is finished yet")
    return list(finished.values())


def drawn(seeds: Sequence[Seed], given: argparse.Namespace) -> str:
    """A report: the runs over each other in a picture, and their table."""
    folders = [run.folder for seed in seeds for run in seed.values()]
    picture = plot_runs(folders, given.out / "comparison.png")
    print_table(compare_table(folders))
    return f"picture: {picture}"


def written(
    report: Callable[[Sequence[Seed], Path], str],
) -> Callable[[Sequence[Seed], argparse.Namespace], str]:
    """The report, which is made in a folder, also as OUT/report.md."""

    def write(seeds: Sequence[Seed], given: argparse.Namespace) -> str:
        text = report(seeds, given.out)
        write_output(given.out / "report.md", text)
        return text

    return write
