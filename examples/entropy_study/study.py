"""Which tokens move entropy: the paper's claims in one command.

    python examples/entropy_study/study.py [--seeds 10 11 12 13 14] [--parts main coin noise]
        [--arms static hi ...] [--jobs 2] [--out FOLDER] [--report] [key=value ...]

Makes every arm (arms.py) for every seed, one process a run, and writes OUT/report.md and
OUT/report.html.  A run that is finished is not made again, one that was interrupted continues: give
the same command again.  With --report no run is made: the report is of those that are finished.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1]))  # for what examples share
from arms import PARTS, Part  # noqa: E402
from findings import finished_runs  # noqa: E402
from report import write_report  # noqa: E402
from side_by_side import add_arguments, run_side_by_side  # noqa: E402

from megatron_gpc.config.file import load  # noqa: E402
from megatron_gpc.errors import RunStopped, UserError  # noqa: E402
from megatron_gpc.run.folder import make_model  # noqa: E402

OUT = Path(__file__).parents[2] / "runs" / "entropy-study"
ARMS = [arm for part in PARTS.values() for arm in part.arms]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=ARMS, metavar="ARM")
    parser.add_argument("--report", action="store_true", help="make no run")
    add_arguments(parser, range(10, 15), OUT)
    given = parser.parse_args()
    try:
        seconds = spent(given.out) if given.report else make_runs(given)
        seeds = finished_runs(given.out, given.arms, given.seeds)
        report = write_report(seeds, given.out, command(given), seconds)
    except (UserError, RunStopped) as error:
        print(error, file=sys.stderr)
        return 2 if isinstance(error, UserError) else 1
    print(f"report: {report}")
    return 0


def make_runs(given: argparse.Namespace) -> float:
    """All runs; returns the seconds that this took so far, interruptions left out."""
    begin, before = time.monotonic(), spent(given.out)
    try:
        for name in given.parts:
            make_part(PARTS[name], given)
    finally:
        total = before + time.monotonic() - begin
        if given.out.is_dir():  # else no run was begun
            (given.out / "seconds.txt").write_text(f"{total}\n")
    return total


def make_part(part: Part, given: argparse.Namespace) -> None:
    make_model(load(part.config, [*part.common, *given.overrides]))  # once, not by every run
    runs = {
        f"{arm}-{seed}": [*part.common, *part.arms[arm], f"seed={seed}", *given.overrides]
        for seed in given.seeds
        for arm in part.arms
        if arm in given.arms
    }
    run_side_by_side(part.config, given.out, runs, given.jobs)


def spent(out: Path) -> float:
    """Seconds that the runs in a folder have taken."""
    file = out / "seconds.txt"
    return float(file.read_text()) if file.exists() else 0.0


def command(given: argparse.Namespace) -> str:
    """What makes these runs again."""
    parts = [
        "python examples/entropy_study/study.py",
        f"--seeds {' '.join(map(str, given.seeds))}",
        f"--parts {' '.join(given.parts)}",
    ]
    if set(given.arms) != set(ARMS):
        parts.append(f"--arms {' '.join(given.arms)}")
    return " ".join([*parts, *given.overrides])


if __name__ == "__main__":
    sys.exit(main())
