"""Static clipping against ID on the same start, over seeds, in one picture: `make compare`.

    python examples/arithmetic/compare.py [--start start-peaked] [--seeds 0 1 2]
        [--arms static id] [--report] [--jobs 2] [--out FOLDER] [key=value ...]

The start is the peaked one of build.py unless --start says `start`, the main job's: from there the
policy has so much to learn that entropy falls whatever the thresholds are (README).

Runs go side by side, one process each (TP1 PP1: layouts give the same numbers, and small ones are
faster), as many as there are cores.  A run that is finished is not made again; one that was
interrupted continues.  The picture and the table are written to runs/arithmetic-compare/.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1]))  # for what examples share
from comparison import Arm, comparison_parser, drawn, run_comparison  # noqa: E402

HERE = Path(__file__).parent
OUT = HERE.parents[1] / "runs" / "arithmetic-compare"
ARMS = ("static", "hi", "lo", "id", "did", "od")


def main() -> int:
    parser = comparison_parser(__doc__, range(3), OUT)
    parser.add_argument("--start", choices=["start", "start-peaked"], default="start-peaked")
    parser.add_argument("--arms", choices=ARMS, nargs="+", default=("static", "id"))
    return run_comparison(parser, arms_of, drawn)


def arms_of(given: argparse.Namespace) -> dict[str, Arm]:
    start = HERE / given.start
    common = (
        f"model.hf={start}",
        f"model.build={HERE / ('build_peaked.py' if 'peaked' in given.start else 'build.py')}",
        f"data.prompts={start}/train.jsonl",
        f"eval.prompts={start}/heldout.jsonl",
        *("parallel.tp=1", "parallel.pp=1"),
    )
    return {arm: Arm(HERE / "config.yaml", common, [f"clip.schedule={arm}"]) for arm in given.arms}


if __name__ == "__main__":
    sys.exit(main())
