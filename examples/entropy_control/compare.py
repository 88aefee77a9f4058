"""Every schedule on the main job's task, over seeds, in one picture: `make compare`.

    python examples/entropy_control/compare.py [--seeds 0 1 2 3 4] [--arms static id]
        [--jobs 2] [--out FOLDER] [key=value ...]

Runs go side by side, one process each (TP1 PP1: layouts give the same numbers, and small ones are
faster), as many as there are cores.  A run that is finished is not made again; one that was
interrupted continues.  They lie in runs/compare/ARM-SEED; beside them the picture, and static.json,
which is what the main job's last sentence compares with:

    cp runs/compare/static.json examples/entropy_control/
"""

from __future__ import annotations

import argparse
import sys
from itertools import product
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1]))  # for what examples share
from side_by_side import add_arguments, compare  # noqa: E402

from megatron_gpc.metrics.baseline import record  # noqa: E402

CONFIG = Path(__file__).with_name("config.yaml")
OUT = Path(__file__).parents[2] / "runs" / "compare"
ARMS = ("static", "hi", "lo", "id", "did", "od", "target")
TARGET = "clip.target=[[0,100%],[0.5,110%],[1,75%]]"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arms", choices=ARMS, nargs="+", default=ARMS)
    add_arguments(parser, range(5), OUT)
    given = parser.parse_args()

    runs = {
        f"{arm}-{seed}": [
            *("parallel.tp=1", "parallel.pp=1", "plots=false", "log.baseline=null"),
            *([TARGET] if arm == "target" else []),
            *given.overrides,
            f"clip.schedule={arm}",
            f"seed={seed}",
        ]
        for seed, arm in product(given.seeds, given.arms)
    }
    failed = compare(CONFIG, given.out, runs, given.jobs)
    if not failed and "static" in given.arms:
        static = [given.out / f"static-{seed}" for seed in given.seeds]
        print(f"record: {record(static, given.out / 'static.json')}")
    return failed


if __name__ == "__main__":
    sys.exit(main())
