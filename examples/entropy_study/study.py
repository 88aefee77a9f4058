"""Which tokens move entropy: the paper's claims in one command.

    python examples/entropy_study/study.py [--seeds 10 11 12 13 14] [--parts main coin noise]
        [--arms static hi ...] [--jobs 2] [--out FOLDER] [--report] [key=value ...]

Makes every arm (arms.py) for every seed, one process a run, and writes OUT/report.md and
OUT/report.html.  A run that is finished is not made again, one that was interrupted continues: give
the same command again.  With --report no run is made: the report is of those that are finished.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1]))  # for what examples share
from arms import PARTS  # noqa: E402
from claims import FRESH_SEEDS  # noqa: E402
from comparison import Arm, comparison_parser, run_comparison  # noqa: E402
from findings import Seed  # noqa: E402
from report import write_report  # noqa: E402

from megatron_gpc.errors import UserError  # noqa: E402

OUT = Path(__file__).parents[2] / "runs" / "entropy-study"
ARMS = [arm for part in PARTS.values() for arm in part.arms]


def main() -> int:
    parser = comparison_parser(__doc__, FRESH_SEEDS, OUT)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--arms", nargs="+", choices=ARMS, metavar="ARM")
    return run_comparison(parser, arms_of, report)


def arms_of(given: argparse.Namespace) -> dict[str, Arm]:
    """
    Raises:
        UserError: an arm is of none of the parts.
    """
    arms = {
        name: Arm(part.config, part.common, own)
        for part in (PARTS[name] for name in given.parts)
        for name, own in part.arms.items()
    }
    for arm in given.arms or ():
        if arm not in arms:
            (part,) = (name for name in PARTS if arm in PARTS[name].arms)
            raise UserError(
                f"--arms {arm}: is of part {part}, and --parts are {' '.join(given.parts)}; the "
                f"arms of these are {' '.join(arms)}"
            )
    return {name: arms[name] for name in given.arms or arms}


def report(seeds: Sequence[Seed], given: argparse.Namespace) -> str:
    return f"report: {write_report(seeds, given.out, command(given))}"


def command(given: argparse.Namespace) -> str:
    """What makes these runs again."""
    words = ["python", "examples/entropy_study/study.py", *given.overrides]
    words += ["--seeds", *map(str, given.seeds), "--parts", *given.parts]
    return shlex.join([*words, *(["--arms", *given.arms] if given.arms else [])])


if __name__ == "__main__":
    sys.exit(main())
