"""Show saved samples of a training step (rollout.save_samples=true)."""

from __future__ import annotations

import argparse
from pathlib import Path

from megatron_gpc.commands.arguments import number
from megatron_gpc.errors import UserError
from megatron_gpc.metrics.tables import print_table, samples_table
from megatron_gpc.rollout.samples import read_samples, saved_steps


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run_dir", type=Path, metavar="RUN", help="run folder")
    parser.add_argument(
        "--step", type=number(int, 0), help="training step (default: the last saved)"
    )
    parser.add_argument(
        "--prompt", type=number(int, 0), help="only this prompt, by its number, from 0"
    )
    parser.add_argument(
        "--limit", type=number(int, 1), default=40, help="samples shown at most (40)"
    )


def run(arguments: argparse.Namespace) -> int:
    step = arguments.step
    if step is None:
        step = max(saved_steps(arguments.run_dir), default=1)
    saved = read_samples(arguments.run_dir, step)
    rows = [
        (sample, advantage)
        for sample, advantage in zip(saved.samples, saved.advantages, strict=True)
        if arguments.prompt in (None, sample.prompt.index)
    ]
    if not rows:
        there = sorted({sample.prompt.index for sample in saved.samples})
        raise UserError(f"--prompt {arguments.prompt}: not in step {step}; there are {there}")
    print_table(samples_table(step, rows[: arguments.limit], len(rows)))
    return 0
