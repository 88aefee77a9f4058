"""Where the main job's time goes: seconds of a training step and its parts, at two layouts.

    python tools/bench/loop.py [--steps 20] [--layouts 1x1 2x2] [KEY=VALUE ...]

Trains examples/entropy_control once a layout (TP x PP), without checkpoints, and takes the median
of every part over the steps after the second.  The last column is what a whole command takes
besides its steps: start, evaluation of the first and last policy, picture.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

CONFIG = Path(__file__).resolve().parents[2] / "examples/entropy_control/config.yaml"
PARTS = ("rollout", "sync", "train")


def run(folder: Path, layout: str, steps: int, overrides: list[str]) -> tuple[list[dict], float]:
    """(a line of metrics a step, seconds of the whole command)."""
    tp, pp = layout.split("x")
    given = (f"run_dir={folder}", f"parallel.tp={tp}", f"parallel.pp={pp}", f"train.steps={steps}")
    begin = time.perf_counter()
    subprocess.run(
        [sys.executable, "-m", "megatron_gpc", "train", str(CONFIG), *given]
        + ["checkpoint.every=0", *overrides],
        stdout=subprocess.DEVNULL,
        check=True,
        timeout=1200,
    )
    seconds = time.perf_counter() - begin
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines], seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--layouts", nargs="+", default=["1x1", "2x2"], help="TPxPP")
    parser.add_argument("overrides", nargs="*", default=[], metavar="KEY=VALUE")
    arguments = parser.parse_args()
    table = Table(title="the main job: median seconds of a training step")
    for heading in ("TP x PP", *PARTS, "step", "besides steps"):
        table.add_column(heading, justify="right")
    for layout in arguments.layouts:
        with tempfile.TemporaryDirectory() as name:
            lines, whole = run(Path(name) / "run", layout, arguments.steps, arguments.overrides)
        parts = [[line[f"seconds_{part}"] for part in PARTS] for line in lines]
        medians = [statistics.median(column) for column in zip(*parts[2:], strict=True)]
        step = statistics.median(map(sum, parts[2:]))
        besides = whole - sum(map(sum, parts))
        table.add_row(layout, *(f"{value:.3f}" for value in (*medians, step)), f"{besides:.1f}")
    Console(width=100).print(table)


if __name__ == "__main__":
    main()
