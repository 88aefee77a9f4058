"""Time per step, synchronous against overlapped (rollout.overlap), on the example.

    python tools/bench/overlap.py [--steps 20] [key=value ...]

Both runs take the same overrides, so engines and layout can be chosen:

    python tools/bench/overlap.py rollout.server.kind=sglang sglang.python=/envs/sglang/bin/python

The overlapped run samples for the next step while it trains.  Where both have to share the same
cores little is gained; where engines have their own, up to the shorter of the two.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import rich.console
from rich.table import Table

CONFIG = Path(__file__).parents[2] / "examples" / "arithmetic" / "config.yaml"
PARTS = ("seconds_rollout", "seconds_sync", "seconds_train")
WARM_UP = 3
"""First steps that are left out: engines and allocators are cold, and nothing was made ahead."""


def measure(run_dir: Path, overlap: bool, steps: int, overrides: list[str]) -> list[float]:
    """Median seconds of each of PARTS over the run's steps, and of their sum."""
    subprocess.run(
        [
            *(sys.executable, "-m", "megatron_gpc", "train", str(CONFIG), f"run_dir={run_dir}"),
            *(f"train.steps={steps}", "eval.prompts=null", "checkpoint.every=0", *overrides),
            f"rollout.overlap={overlap}",
        ],
        check=True,
        stdout=subprocess.DEVNULL,
    )
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()[WARM_UP:]
    found = [[json.loads(line)[part] for part in PARTS] for line in lines]
    return [statistics.median(times) for times in zip(*[[*f, sum(f)] for f in found], strict=True)]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    arguments = parser.parse_args()
    if arguments.steps <= WARM_UP:
        parser.error(f"--steps must be more than {WARM_UP}")
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


if __name__ == "__main__":
    main()
