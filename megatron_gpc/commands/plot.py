"""Draw one run, or lay several over each other (seeds are pooled)."""

from __future__ import annotations

import argparse
from pathlib import Path

from megatron_gpc.metrics.baseline import record
from megatron_gpc.metrics.plots import plot_run, plot_runs
from megatron_gpc.metrics.tables import compare_table, print_table
from megatron_gpc.run.files import check_new


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run folder")
    parser.add_argument("--out", type=Path, help="picture to write")
    parser.add_argument(
        "--record",
        type=Path,
        metavar="FILE",
        help="also record these runs, seeds of one experiment, as log.baseline of others",
    )


def run(arguments: argparse.Namespace) -> int:
    for name in ("out", "record"):
        if getattr(arguments, name):
            check_new(f"--{name}", getattr(arguments, name))
    if len(arguments.runs) == 1:
        print(plot_run(arguments.runs[0], arguments.out))
    else:
        print(plot_runs(arguments.runs, arguments.out or Path("comparison.png")))
        print_table(compare_table(arguments.runs))
    if arguments.record:
        print(record(arguments.runs, arguments.record))
    return 0
