"""One process of a training, which `train` starts."""

from __future__ import annotations

import argparse
from pathlib import Path

from megatron_gpc.config import Config
from megatron_gpc.config.file import load
from megatron_gpc.errors import RunStopped, UserError
from megatron_gpc.run.files import disk_problem
from megatron_gpc.run.imports import many_imports
from megatron_gpc.run.launch import outcome
from megatron_gpc.run.stop import SAVED, StopRequest


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", type=Path)


def run(arguments: argparse.Namespace) -> int:
    return train_rank(load(arguments.config))


def train_rank(config: Config) -> int:
    """Train as the rank that the environment says; the exit code."""
    stop = StopRequest()
    with many_imports():
        from megatron_gpc.mcore import cpu

        cpu.install()  # before the first megatron import
        from megatron_gpc.engines.answers import RolloutError
        from megatron_gpc.run.watchdog import recorded
        from megatron_gpc.train import train

    @recorded
    def trained() -> bool:
        try:
            return train(config, stop)
        except RolloutError as error:
            raise RunStopped(f"rollout server: {error}") from error
        except OSError as error:
            if (problem := disk_problem(error, config.run_dir)) is None:
                raise
            raise UserError(f"{problem}; once that is mended, the same command continues") from None

    finished = trained()
    stop.over()
    return outcome(0 if finished else SAVED)
