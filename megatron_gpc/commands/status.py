"""How a run is doing, read from its folder alone."""

from __future__ import annotations

import argparse
from pathlib import Path

from megatron_gpc.commands.arguments import number
from megatron_gpc.metrics.status import first_traceback, status_lines


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run_dir", type=Path, metavar="RUN", help="run folder")
    parser.add_argument(
        "--lead", type=number(float, 0), metavar="S", help="check this lead of a time limit"
    )
    parser.add_argument(
        "--traceback", action="store_true", help="show what the rank that failed first said"
    )


def run(arguments: argparse.Namespace) -> int:
    if arguments.traceback:
        print(first_traceback(arguments.run_dir))
    else:
        print("\n".join(status_lines(arguments.run_dir, arguments.lead)))
    return 0
