"""Every schedule on the main job's task, over seeds, in one picture: `make compare`.

    python examples/entropy_control/compare.py [--seeds 0 1 2 3 4] [--arms static id]
        [--report] [--jobs 2] [--out FOLDER] [key=value ...]

Runs go side by side, one process each (TP1 PP1: layouts give the same numbers, and small ones are
faster), as many as there are cores.  A run that is finished is not made again; one that was
interrupted continues.  They lie in runs/compare/ARM-SEED; beside them the picture, and static.json,
which is what the main job's last sentence compares with.  With --report no run is made.

    cp runs/compare/static.json examples/entropy_control/
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1]))  # for what examples share
from comparison import Arm, comparison_parser, drawn, run_comparison  # noqa: E402
from findings import STATIC, Seed, in_all, over  # noqa: E402

from megatron_gpc.metrics.baseline import record  # noqa: E402
from megatron_gpc.metrics.tables import target_distance  # noqa: E402

CONFIG = Path(__file__).with_name("config.yaml")
OUT = Path(__file__).parents[2] / "runs" / "compare"
ARMS = (STATIC, "hi", "lo", "id", "did", "od", "target")
COMMON = ("parallel.tp=1", "parallel.pp=1", "plots=false", "log.baseline=null")
TARGET = "clip.target=[[0,100%],[0.5,110%],[1,75%]]"


def main() -> int:
    parser = comparison_parser(__doc__, range(5), OUT)
    parser.add_argument("--arms", choices=ARMS, nargs="+", default=ARMS)
    return run_comparison(parser, arms_of, report)


def arms_of(given: argparse.Namespace) -> dict[str, Arm]:
    return {
        arm: Arm(
            CONFIG,
            (*COMMON, TARGET) if arm == "target" else COMMON,  # an override may draw another curve
            [f"clip.schedule={arm}"],
        )
        for arm in given.arms
    }


def report(seeds: Sequence[Seed], given: argparse.Namespace) -> str:
    text = drawn(seeds, given)
    if in_all(seeds, ["target"]):
        apart = over(seeds, "target", target_distance)
        text += f"\nentropy's distance from the curve: {apart} nats (half a 95 % interval)"
    if static := [seed[STATIC].folder for seed in seeds if STATIC in seed]:
        text += f"\nrecord: {record(static, given.out / 'static.json')}"
    return text


if __name__ == "__main__":
    sys.exit(main())
