"""Which tokens move entropy: the paper's claims on the arithmetic task, in one command.

    python examples/entropy_study/study.py [--seeds 0 1 2 3 4] [--steps 24] [--jobs 2]
        [--arms static hi ...] [--start FOLDER] [--out FOLDER] [key=value ...]

Makes every arm of ARMS for every seed, one process a run, and writes OUT/report.md and
OUT/report.html.  A run that is finished is not made again, one that was interrupted continues: give
the same command again.  All runs start from one warm-up, the peaked one of examples/arithmetic.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from report import write_report

from megatron_gpc.config.file import load
from megatron_gpc.errors import RunStopped, UserError
from megatron_gpc.metrics.runs import load_run
from megatron_gpc.run.folder import make_model

sys.path.append(str(Path(__file__).parents[1]))  # for what examples share
from side_by_side import run_side_by_side  # noqa: E402

ROOT = Path(__file__).parents[2]
ARITHMETIC = ROOT / "examples" / "arithmetic"
START = ARITHMETIC / "start-peaked"
STATIC = "clip.schedule=static"
MEASURED = "diagnostics.entropy_change=true"

ARMS: Mapping[str, tuple[str, ...]] = {
    "static": (STATIC, MEASURED),
    "clip-higher": (STATIC, "clip.eps_high=0.28"),
    "e1": (STATIC, "clip.regions=e1", MEASURED),
    "e2": (STATIC, "clip.regions=e2", MEASURED),
    "e3": (STATIC, "clip.regions=e3", MEASURED),
    "e4": (STATIC, "clip.regions=e4", MEASURED),
    "hi": ("clip.schedule=hi",),
    "lo": ("clip.schedule=lo",),
    "id": ("clip.schedule=id", MEASURED),
    "did": ("clip.schedule=did",),
    "od": ("clip.schedule=od",),
    "od-0.5": ("clip.schedule=od", "clip.od_floor=0.5"),  # the default, 0.2, is not reached so soon
    "id-0.3": ("clip.schedule=id", "clip.phase_split=0.3"),
    "id-0.4": ("clip.schedule=id", "clip.phase_split=0.4"),
    "id-0.6": ("clip.schedule=id", "clip.phase_split=0.6"),
}
LEARNING_RATE = 3e-4
"""Three times the example's: ratios then reach the bounds in one unlikely token of ten or so, and
thresholds act.  At 1e-4 runs do not tell them apart; at 1e-3 the policy forgets its format."""
SHORT = {"e1", "e2", "e3", "e4"}
"""Arms of a third of the steps: a sign shows early, and the policies do not survive for long."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--steps", type=int, default=24, help="of a run; the regions' a third")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="runs at a time")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS), metavar="ARM")
    parser.add_argument("--start", type=Path, default=START)
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "entropy-study")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    arguments = parser.parse_args()
    try:
        seconds = make_runs(arguments)
        seeds = [
            {arm: load_run(arguments.out / f"{arm}-{seed}") for arm in arguments.arms}
            for seed in arguments.seeds
        ]
        report = write_report(seeds, arguments.out, command(arguments), seconds)
    except (UserError, RunStopped) as error:
        print(error, file=sys.stderr)
        return 2 if isinstance(error, UserError) else 1
    print(f"report: {report}")
    return 0


def make_runs(arguments: argparse.Namespace) -> float:
    """All runs; returns the seconds that this command has taken so far, interruptions left out."""
    common = [
        f"model.hf={arguments.start}",
        f"model.build={ARITHMETIC / 'build_peaked.py'}",
        f"data.prompts={arguments.start}/train.jsonl",
        f"eval.prompts={arguments.start}/heldout.jsonl",
        *("parallel.tp=1", "parallel.pp=1", "plots=false"),
        f"optim.lr={LEARNING_RATE}",
    ]
    config = ARITHMETIC / "config.yaml"
    begin = time.monotonic()
    make_model(load(config, common))  # once, before runs that would all build it
    runs = {
        f"{arm}-{seed}": [
            *common,
            *ARMS[arm],
            f"train.steps={max(1, arguments.steps // 3) if arm in SHORT else arguments.steps}",
            f"seed={seed}",
            *arguments.overrides,
        ]
        for seed in arguments.seeds
        for arm in arguments.arms
    }
    file = arguments.out / "seconds.txt"
    before = float(file.read_text()) if file.exists() else 0.0
    try:
        run_side_by_side(config, arguments.out, runs, arguments.jobs)
    finally:
        total = before + time.monotonic() - begin
        file.write_text(f"{total}\n")
    return total


def command(arguments: argparse.Namespace) -> str:
    """What makes these runs again."""
    parts: Sequence[str] = [
        "python examples/entropy_study/study.py",
        f"--seeds {' '.join(map(str, arguments.seeds))}",
        f"--steps {arguments.steps}",
        f"--jobs {arguments.jobs}",
    ]
    if set(arguments.arms) != set(ARMS):
        parts = [*parts, f"--arms {' '.join(arguments.arms)}"]
    if arguments.start != START:
        parts = [*parts, f"--start {arguments.start}"]
    return " ".join([*parts, *arguments.overrides])


if __name__ == "__main__":
    sys.exit(main())
