"""Evaluate a checkpoint on held-out prompts.

Samples eval.samples answers to every prompt of eval.prompts, judges them with data.verifier, and
prints mean@n and pass@k.
"""

from __future__ import annotations

import argparse
import signal
from pathlib import Path

from megatron_gpc.commands.arguments import add_configuration
from megatron_gpc.config.file import load
from megatron_gpc.errors import RunStopped
from megatron_gpc.run.imports import many_imports


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_configuration(parser)
    parser.add_argument(
        "--checkpoint",
        type=Path,
        metavar="DIR",
        help="a run (its newest checkpoint), RUN/checkpoints/step_N, a Hugging Face folder or a "
        "converted one (default: model.hf)",
    )
    parser.add_argument(
        "--out",
        type=Path,
        metavar="FILE",
        help="JSON file to write (default: a file of its own in evaluations/ of the run that saved "
        "the checkpoint, or beside run_dir if none did)",
    )


def run(arguments: argparse.Namespace) -> int:
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # what it has made is removed
    config = load(arguments.config, arguments.overrides)
    with many_imports():
        from megatron_gpc.engines.answers import RolloutError
        from megatron_gpc.evaluate import evaluate
        from megatron_gpc.metrics.tables import evaluation_table, print_table
        from megatron_gpc.run.folder import make_model

    if arguments.checkpoint is None:
        make_model(config)
    try:
        file, found = evaluate(config, arguments.checkpoint, arguments.out)
    except RolloutError as error:
        raise RunStopped(f"rollout server: {error}") from error
    print_table(evaluation_table(found))
    print(file)
    return 0
