"""Time per step, synchronous against overlapped (rollout.overlap), on the example.

    python tools/bench/overlap.py [--steps 20] [key=value ...]

Both runs take the same overrides, so engines and layout can be chosen:

    python tools/bench/overlap.py rollout.server.kind=sglang sglang.python=/envs/sglang/bin/python

The overlapped run samples for the next step while it trains.  Where both have to share the same
cores little is gained; where engines have their own, up to the shorter of the two.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import sys
import tempfile
from pathlib import Path

import rich.console
from rich.table import Table
from training import train

from megatron_gpc.cli import Parser, exit_code
from megatron_gpc.commands.arguments import number

CONFIG = Path(__file__).parents[2] / "examples" / "arithmetic" / "config.yaml"
PARTS = ("seconds_rollout", "seconds_sync", "seconds_train")
WARM_UP = 3
"""First steps that are left out: engines and allocators are cold, and nothing was made ahead."""


def measure(run_dir: Path, overlap: bool, steps: int, overrides: list[str]) -> list[float]:
    """Median seconds of each of PARTS over the run's steps, and of their sum."""
    steady = (f"train.steps={steps}", "eval.prompts=null", "checkpoint.every=0")
    last = (f"run_dir={run_dir}", f"rollout.overlap={overlap}")
    lines = train(CONFIG, *steady, *overrides, *last)[WARM_UP:]
    found = [[line[part] for part in PARTS] for line in lines]
    return [statistics.median(times) for times in zip(*[[*f, sum(f)] for f in found], strict=True)]


def main() -> int:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=number(int, WARM_UP + 1), default=20)
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    arguments = parser.parse_intermixed_args()
    with tempfile.TemporaryDirectory() as folder:
        times = {
            name: measure(
                Path(folder) / name, name == "overlapped", arguments.steps, arguments.overrides
            )
            for name in ("synchronous", "overlapped")
        }
    table = Table(title="median seconds a step")
    for heading in ("", "rollout", "weights", "training", "step"):
        table.add_column(heading, justify="right" if heading else "left")
    for name, seconds in times.items():
        table.add_row(name, *(f"{value:.2f}" for value in seconds))
    console = rich.console.Console()
    console.print(table)
    ratio = times["synchronous"][-1] / times["overlapped"][-1]
    cores = len(os.sched_getaffinity(0))
    console.print(f"synchronous / overlapped: {ratio:.2f}; {cores} {platform.machine()} cores")
    return 0


if __name__ == "__main__":
    sys.exit(exit_code(main))
