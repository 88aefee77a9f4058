"""The command line: `megatron-gpc train CONFIG [key=value ...]`, `serve`, `plot`, `samples`."""

from __future__ import annotations

import argparse
import os
import shlex
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TextIO

from megatron_gpc import __version__
from megatron_gpc.config import Config
from megatron_gpc.config.file import dump, load, warnings
from megatron_gpc.errors import RunStopped, UserError
from megatron_gpc.run.imports import many_imports
from megatron_gpc.run.say import say
from megatron_gpc.run.stop import (
    AT_ONCE,
    BATCH_SIGNALS,
    INTERRUPTED,
    SAVED,
    STOP_SIGNALS,
    StopRequest,
    held,
)


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point.

    Returns:
        0; 1 where a run ended itself, 2 where the user's input cannot be used (both said in one
        line, no traceback); 75 where a run was asked to end and saved; 130 where Ctrl-C ended it;
        otherwise the exit code of the part that failed.
    """
    parser = _parser()
    # argparse gives up on overrides that follow an option: they are what is left over.
    arguments, rest = parser.parse_known_args(argv)
    if any(word.startswith("-") for word in rest) or (rest and "overrides" not in arguments):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        arguments.overrides += rest
    try:
        return int(arguments.run(arguments))
    except UserError as error:
        print(f"megatron-gpc: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        say("interrupted")
        return INTERRUPTED
    except RunStopped as stopped:
        say(str(stopped))  # every rank stops, with the same words
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="megatron-gpc",
        description="Reinforcement learning with gradient-preserving entropy control on Megatron.",
    )
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    start = commands.add_parser(
        "init",
        help="write a run to start from",
        description="Write config.yaml, prompts.jsonl, reward.py and build_model.py (makes a tiny "
        "model) into a folder.  The run works as it is; change the files into your own.",
    )
    start.add_argument("folder", type=Path, metavar="DIR", help="folder; made if it is missing")
    start.set_defaults(run=_init)

    train = commands.add_parser(
        "train",
        help="run a training",
        description="Run a training.  Starts tp * pp * cp * dp processes, unless it finds itself "
        "to be one of those of torchrun or srun.",
    )
    train.add_argument("config", type=Path, help="YAML file")
    train.add_argument(
        "overrides",
        nargs="*",
        metavar="key=value",
        help="replace a key of the file, such as clip.schedule=static",
    )
    train.add_argument(
        "--dry-run", action="store_true", help="print the resolved configuration and stop"
    )
    train.set_defaults(run=_train)

    status = commands.add_parser(
        "status", help="how a run is doing", description="Read from the run's folder alone."
    )
    status.add_argument("run_dir", type=Path, metavar="RUN", help="run folder")
    status.add_argument("--lead", type=float, metavar="S", help="check this lead of a time limit")
    status.add_argument(
        "--traceback", action="store_true", help="show what the rank that failed first said"
    )
    status.set_defaults(run=_status)

    serve = commands.add_parser(
        "serve",
        help="start rollout engines for a run elsewhere",
        description="Start rollout.server.engines engines on this node, or with srun one task a "
        "node on several, and write their addresses to rollout.server.urls_file.",
    )
    _add_configuration(serve)
    serve.set_defaults(run=_serve)

    rank = commands.add_parser("rank")  # no help: what `train` starts its processes with
    rank.add_argument("config", type=Path)
    rank.set_defaults(run=_rank)

    held_out = commands.add_parser(
        "eval",
        help="evaluate a checkpoint on held-out prompts",
        description="Sample eval.samples answers to every prompt of eval.prompts, judge them with "
        "data.verifier, and print mean@n and pass@k.",
    )
    _add_configuration(held_out)
    held_out.add_argument(
        "--checkpoint",
        type=Path,
        metavar="DIR",
        help="a run (its newest checkpoint), RUN/checkpoints/step_N, a Hugging Face folder or a "
        "converted one (default: model.hf)",
    )
    held_out.add_argument(
        "--out",
        type=Path,
        metavar="FILE",
        help="JSON file to write (default: a file of its own in evaluations/ of the run that saved "
        "the checkpoint, or beside run_dir where none did)",
    )
    held_out.set_defaults(run=_eval)

    doctor = commands.add_parser(
        "doctor",
        help="look whether this node or allocation can train",
        description="Check versions, GPUs, network, memory, ports and shared folders, and say what "
        "to do about each finding.  Below srun or torchrun all processes are looked at together.  "
        "Exit code 1: a problem was found.",
    )
    doctor.add_argument("--config", type=Path, help="YAML file to hold the nodes against")
    doctor.add_argument("overrides", nargs="*", metavar="key=value", help="replace a key of it")
    doctor.add_argument(
        "--shared",
        type=Path,
        action="append",
        default=[],
        metavar="DIR",
        help="folder that all nodes must share; may be given again",
    )
    doctor.add_argument(
        "--port",
        type=int,
        action="append",
        default=[],
        dest="ports",
        metavar="PORT",
        help="port that must be free on every node; may be given again",
    )
    doctor.add_argument(
        "--sglang",
        type=Path,
        metavar="PYTHON",
        help="interpreter of SGLang's environment (default: the configuration's)",
    )
    doctor.add_argument(
        "--timeout",
        type=float,
        default=120.0,
        metavar="S",
        help="how long processes wait for each other (%(default)g s)",
    )
    doctor.set_defaults(run=_doctor)

    plot = commands.add_parser(
        "plot",
        help="draw runs again",
        description="Draw one run, or lay several over each other (seeds are pooled).",
    )
    plot.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run folder")
    plot.add_argument("--out", type=Path, help="picture to write")
    plot.set_defaults(run=_plot)

    samples = commands.add_parser(
        "samples",
        help="look at what was sampled",
        description="Show saved samples of a training step (rollout.save_samples=true).",
    )
    samples.add_argument("run_dir", type=Path, metavar="RUN", help="run folder")
    samples.add_argument("--step", type=int, help="training step (default: the last saved)")
    samples.add_argument("--prompt", type=int, help="only this prompt, by its number, from 0")
    samples.add_argument("--limit", type=int, default=40, help="samples shown at most (40)")
    samples.set_defaults(run=_samples)
    return parser


def _add_configuration(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", type=Path, help="YAML file, the same as for train")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="replace a key")


def _init(arguments: argparse.Namespace) -> int:
    from megatron_gpc.commands.init import init

    for file in init(arguments.folder):
        print(file)
    print(f"now: megatron-gpc train {shlex.quote(str(arguments.folder / 'config.yaml'))}")
    return 0


def _train(arguments: argparse.Namespace) -> int:
    from megatron_gpc.run.launch import STACKS_SIGNAL

    signal.signal(STACKS_SIGNAL, signal.SIG_IGN)  # until there are ranks that have stacks
    # Until there are ranks that can hear of them.  Ctrl-C ends it at once: nothing is lost yet.
    with held(BATCH_SIGNALS):
        return _start_or_be_a_rank(arguments)


def _start_or_be_a_rank(arguments: argparse.Namespace) -> int:
    config = load(arguments.config, arguments.overrides)  # mistakes are told before this import:
    with many_imports():
        import torch

        from megatron_gpc.doctor.continued import consequences
        from megatron_gpc.doctor.preflight import check_training  # noqa: F401 - for _check
        from megatron_gpc.run.folder import make_model, prepare
        from megatron_gpc.run.launch import STACKS_SIGNAL, die_with_parent, run_ranks
        from megatron_gpc.run.placement import adopt_rank, my_share

    complete = _check(config)
    gpus = torch.cuda.device_count()
    share = None if adopt_rank(config.parallel, gpus) else my_share(config.parallel, gpus)
    for warning in warnings(config):
        say(f"warning: {warning}")
    if arguments.dry_run:
        print(dump(config), end="")
        return 0

    def ready() -> TextIO:
        if not complete:
            make_model(config)
            _check(config)
        return prepare(config, consequences)

    if share is None:
        if "TORCHELASTIC_RUN_ID" in os.environ:
            die_with_parent()  # torchrun itself leaves its ranks behind at a second Ctrl-C
        if os.environ["RANK"] == "0":
            lock = ready()  # noqa: F841 - until this process ends
        return _train_rank(config)
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


def _status(arguments: argparse.Namespace) -> int:
    from megatron_gpc.metrics.status import first_traceback, status_lines

    if arguments.traceback:
        print(first_traceback(arguments.run_dir))
    else:
        print("\n".join(status_lines(arguments.run_dir, arguments.lead)))
    return 0


def _serve(arguments: argparse.Namespace) -> int:
    stop = StopRequest()
    from megatron_gpc.run.launch import STACKS_SIGNAL

    signal.signal(STACKS_SIGNAL, signal.SIG_IGN)  # `job.sh stacks` sends it to all of a job
    with many_imports():
        from megatron_gpc.doctor.preflight import check_serving
        from megatron_gpc.engines.serve import serve

    config = load(arguments.config, arguments.overrides)
    check_serving(config)
    serve(config, stop)
    return INTERRUPTED if stop.received is signal.SIGINT else 0


def _rank(arguments: argparse.Namespace) -> int:
    return _train_rank(load(arguments.config))


def _train_rank(config: Config) -> int:
    stop = StopRequest()
    with many_imports():
        from megatron_gpc.mcore import cpu

        cpu.install()  # before the first megatron import
        from megatron_gpc.engines.answers import RolloutError
        from megatron_gpc.run.watchdog import recorded
        from megatron_gpc.train import train

    @recorded
    def run() -> bool:
        try:
            return train(config, stop)
        except RolloutError as error:
            raise RunStopped(f"rollout server: {error}") from error

    finished = run()
    stop.over()
    return 0 if finished else SAVED


def _is_first() -> bool:
    """Whether this process is the first of those that work on a run, or the only one."""
    return os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")) == "0"


def _check(config: Config) -> bool:
    """Refuse what cannot work before any process starts; one of several processes reads it all.

    Returns:
        Whether that was all of it: model.build may have yet to make the model.
    """
    from megatron_gpc.doctor.preflight import check_training

    return check_training(config, lambda text: say(f"warning: {text}"), whole=_is_first())


def _eval(arguments: argparse.Namespace) -> int:
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


def _doctor(arguments: argparse.Namespace) -> int:
    if arguments.overrides and arguments.config is None:
        raise UserError("key=value replaces a key of a configuration: name it with --config")
    config = None
    sglang_python = arguments.sglang
    if arguments.config is not None:
        config = load(arguments.config, arguments.overrides)
        if sglang_python is None and config.rollout.server.kind == "sglang":
            sglang_python = config.sglang.python or Path(sys.executable)
    with many_imports():
        from megatron_gpc.doctor.run import examine

    return examine(
        config,
        shared=arguments.shared,
        ports=arguments.ports,
        sglang_python=sglang_python,
        timeout_s=arguments.timeout,
    )


def _plot(arguments: argparse.Namespace) -> int:
    from megatron_gpc.metrics.plots import plot_run, plot_runs
    from megatron_gpc.metrics.tables import compare_table, print_table

    if len(arguments.runs) == 1:
        print(plot_run(arguments.runs[0], arguments.out))
    else:
        print(plot_runs(arguments.runs, arguments.out or Path("comparison.png")))
        print_table(compare_table(arguments.runs))
    return 0


def _samples(arguments: argparse.Namespace) -> int:
    from megatron_gpc.metrics.tables import print_table, samples_table
    from megatron_gpc.rollout.samples import read_samples, saved_steps

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
