"""Where the main job's time goes: seconds of a training step and of its parts, at two layouts.

    python tools/bench/loop.py [--steps 20] [--layouts 1x1 2x2] [KEY=VALUE ...]

Trains examples/entropy_control twice a layout (TP x PP), without checkpoints: for two steps, then
for so many more.  Of a step it says the median seconds of every part, and the CPU seconds of all
processes together: what the longer command took more, divided by its further steps.  Other work on
the machine disturbs those less.  The last two columns are what a command takes besides its steps:
start, evaluation of the first and last policy, picture.
"""

from __future__ import annotations

import re
import resource
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table
from training import train

from megatron_gpc.cli import Parser, exit_code
from megatron_gpc.commands.arguments import number
from megatron_gpc.errors import UserError

CONFIG = Path(__file__).resolve().parents[2] / "examples/entropy_control/config.yaml"
PARTS = ("rollout", "sync", "train")
FIRST = 2
"""Steps that are not counted."""


@dataclass
class Run:
    """What one command took."""

    lines: list[dict]
    """Its metrics, one entry a step."""
    seconds: float
    cpu_seconds: float
    """Of all its processes."""

    @property
    def parts(self) -> list[list[float]]:
        """Seconds of PARTS, step by step."""
        return [[line[f"seconds_{part}"] for part in PARTS] for line in self.lines]


def run(layout: str, steps: int, overrides: list[str]) -> Run:
    tp, pp = layout.split("x")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "run"
        given = (f"run_dir={folder}", f"parallel.tp={tp}", f"parallel.pp={pp}")
        begin, cpu_begin = time.perf_counter(), cpu_of_children()
        steady = (f"train.steps={steps}", "checkpoint.every=0")
        lines = train(CONFIG, *given, *steady, *overrides)
        return Run(lines, time.perf_counter() - begin, cpu_of_children() - cpu_begin)


def cpu_of_children() -> float:
    """CPU seconds of processes that have ended and were waited for, theirs included."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def main() -> int:
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=number(int, 1), default=20)
    parser.add_argument("--layouts", nargs="+", default=["1x1", "2x2"], help="TPxPP")
    parser.add_argument("overrides", nargs="*", default=[], metavar="KEY=VALUE")
    arguments = parser.parse_intermixed_args()
    table = Table(title="the main job: seconds of a training step")
    for heading in ("TP x PP", *PARTS, "step", "CPU a step", "besides steps", "CPU of that"):
        table.add_column(heading, justify="right")
    for layout in arguments.layouts:
        if not re.fullmatch("[1-9][0-9]*x[1-9][0-9]*", layout):
            raise UserError(f"--layouts: expected TPxPP such as 2x2, got {layout!r}")
    for layout in arguments.layouts:
        short = run(layout, FIRST, arguments.overrides)
        whole = run(layout, FIRST + arguments.steps, arguments.overrides)
        settled = whole.parts[FIRST:]
        medians = [statistics.median(column) for column in zip(*settled, strict=True)]
        step = statistics.median(map(sum, settled))
        cpu_step = (whole.cpu_seconds - short.cpu_seconds) / arguments.steps
        besides = whole.seconds - sum(map(sum, whole.parts))
        cpu_besides = short.cpu_seconds - FIRST * cpu_step
        table.add_row(
            layout,
            *(f"{value:.3f}" for value in (*medians, step, cpu_step)),
            *(f"{value:.1f}" for value in (besides, cpu_besides)),
        )
    Console(width=100).print(table)
    return 0


if __name__ == "__main__":
    sys.exit(exit_code(main))
