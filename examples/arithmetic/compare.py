"""Static clipping against ID on the same start, over seeds, in one picture: `make compare`.

    python examples/arithmetic/compare.py [--start start-peaked] [--seeds 0 1 2]
        [--schedules static id] [key=value ...]

The start is the peaked one of build.py unless --start says `start`, the main job's: from there the
policy has so much to learn that entropy falls whatever the thresholds are (README).

Runs go side by side, one process each (TP1 PP1: layouts give the same numbers, and small ones are
faster), as many as there are cores.  A run that is finished is not made again; one that was
interrupted continues.  The picture and the table are written to runs/arithmetic-compare/.
"""

from __future__ import annotations

import argparse
import sys
from itertools import product
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1]))  # for what examples share
from side_by_side import add_arguments, compare  # noqa: E402

HERE = Path(__file__).parent
ROOT = HERE.parents[1]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--start", choices=["start", "start-peaked"], default="start-peaked")
    parser.add_argument("--schedules", nargs="+", default=["static", "id"])
    add_arguments(parser, range(3), ROOT / "runs" / "arithmetic-compare")
    arguments = parser.parse_args()

    start_dir = HERE / arguments.start
    overrides = [
        f"model.hf={start_dir}",
        f"model.build={HERE / ('build_peaked.py' if 'peaked' in arguments.start else 'build.py')}",
        f"data.prompts={start_dir}/train.jsonl",
        f"eval.prompts={start_dir}/heldout.jsonl",
        *("parallel.tp=1", "parallel.pp=1"),
        *arguments.overrides,
    ]
    runs = {
        f"{schedule}-{seed}": [*overrides, f"clip.schedule={schedule}", f"seed={seed}"]
        for seed, schedule in product(arguments.seeds, arguments.schedules)
    }
    return compare(HERE / "config.yaml", arguments.out, runs, arguments.jobs)


if __name__ == "__main__":
    sys.exit(main())
