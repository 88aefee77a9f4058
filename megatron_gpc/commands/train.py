"""Run a training.

Starts tp * pp * cp * dp processes, unless it finds itself to be one of those of torchrun or srun.
"""

from __future__ import annotations

import argparse
import os
import signal
from typing import TextIO

from megatron_gpc.commands.arguments import add_configuration
from megatron_gpc.commands.rank import train_rank
from megatron_gpc.config.file import dump, load, warnings
from megatron_gpc.run import environment
from megatron_gpc.run.child import die_with
from megatron_gpc.run.imports import many_imports
from megatron_gpc.run.launch import STACKS_SIGNAL, run_ranks
from megatron_gpc.run.say import say
from megatron_gpc.run.stop import AT_ONCE, BATCH_SIGNALS, INTERRUPTED, STOP_SIGNALS, held


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_configuration(parser)
    parser.add_argument(
        "--dry-run", action="store_true", help="print the resolved configuration and stop"
    )


def run(arguments: argparse.Namespace) -> int:
    signal.signal(STACKS_SIGNAL, signal.SIG_IGN)  # until there are ranks that have stacks
    # Until there are ranks that can hear of them.  Ctrl-C ends it at once: nothing is lost yet.
    # Imports start threads, and the kernel gives a signal to any thread that does not hold it back.
    with held((*BATCH_SIGNALS, STACKS_SIGNAL)):
        return _start_or_be_a_rank(arguments)


def _start_or_be_a_rank(arguments: argparse.Namespace) -> int:
    config = load(arguments.config, arguments.overrides)  # mistakes are told before this import:
    with many_imports():
        import torch

        from megatron_gpc.doctor.continued import consequences
        from megatron_gpc.doctor.preflight import check_training
        from megatron_gpc.run.folder import make_model, prepare
        from megatron_gpc.run.placement import adopt_rank, gpus_for_ranks, my_share

    def check() -> bool:
        """Refuse what cannot work; one of several processes reads it all.  False if model.build has
        yet to make the model, and not all could be looked at."""
        whole = environment.is_first()
        return check_training(config, lambda text: say(f"warning: {text}"), whole)

    complete = check()
    gpus = gpus_for_ranks(config, torch.cuda.device_count())
    share = None if adopt_rank(config.parallel, gpus) else my_share(config.parallel, gpus)
    for warning in warnings(config):
        say(f"warning: {warning}")
    if arguments.dry_run:
        if not complete:
            say(
                f"model.hf: {config.model.hf} is not there yet: layout, context and prompts are "
                "checked once model.build has made it, at the start of the run"
            )
        print(dump(config), end="")
        return 0

    def ready() -> TextIO:
        if not complete:
            make_model(config)
            check()
        return prepare(config, consequences)

    if share is None:
        if "TORCHELASTIC_RUN_ID" in os.environ:
            die_with(os.getppid())  # torchrun itself leaves its ranks behind at a second Ctrl-C
        if environment.is_first():
            lock = ready()  # noqa: F841 - until this process ends
        return train_rank(config)
    command = ["train", str(arguments.config), *arguments.overrides]  # rank 0 prepares
    if share.ranks == share.world:
        lock = ready()  # noqa: F841 - until this process ends
        command = ["rank", str(config.run_dir / "config.yaml")]
    logs = config.run_dir / "logs"
    passed_on = (*STOP_SIGNALS, STACKS_SIGNAL)
    try:
        return run_ranks(command, share, logs, pass_on=passed_on)
    except KeyboardInterrupt:  # the second; the first was passed on
        say(AT_ONCE)
        return INTERRUPTED
