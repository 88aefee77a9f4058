"""Runs that do not need each other, side by side: for comparisons and studies."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import yaml

from megatron_gpc.config import Config
from megatron_gpc.config.file import dump, flatten, load
from megatron_gpc.errors import RunStopped, UserError
from megatron_gpc.metrics.jsonl import FILE_NAME
from megatron_gpc.metrics.plots import plot_runs
from megatron_gpc.metrics.runs import load_run
from megatron_gpc.metrics.tables import compare_table, print_table
from megatron_gpc.run.child import Child
from megatron_gpc.run.folder import make_model

POLL_S = 0.5
NO_MATTER = (
    *("run_dir", "resume", "timeout_s", "plots", "rollout.server.", "checkpoint.", "guard."),
    "log.",
)
"""Keys and sections that may differ between a run that is there and the one that is asked for."""


def add_arguments(parser: argparse.ArgumentParser, seeds: Sequence[int], out: Path) -> None:
    """--seeds, --jobs, --out and key=value, which all comparisons take."""
    parser.add_argument("--seeds", type=int, nargs="+", action=_Once, default=list(seeds))
    parser.add_argument(
        "--jobs", type=_at_least_one, default=os.cpu_count() or 1, help="runs at a time"
    )
    parser.add_argument("--out", type=_folder, default=out)
    parser.add_argument("overrides", nargs="*", metavar="key=value")


class _Once(argparse.Action):
    """Keeps the first of equal values: a seed that counts twice would narrow the intervals."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option: Any = None) -> None:
        setattr(namespace, self.dest, list(dict.fromkeys(values)))


def _at_least_one(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: a number of 1 or more is needed")
    return int(text)


def _folder(text: str) -> Path:
    path = Path(text)
    if path.exists() and not path.is_dir():
        raise argparse.ArgumentTypeError(f"{text} is a file; name a folder")
    return path


def compare(config: Path, out: Path, runs: Mapping[str, Sequence[str]], jobs: int) -> int:
    """Make every run as `run_side_by_side` does; draw them over each other, print their table, and
    return the exit code."""
    try:
        make_model(load(config, next(iter(runs.values()))))  # once, before runs that would all do
        folders = run_side_by_side(config, out, runs, jobs)
    except (UserError, RunStopped) as error:
        print(error, file=sys.stderr)
        return 2 if isinstance(error, UserError) else 1
    picture = plot_runs(folders, out / "comparison.png")
    print_table(compare_table(folders))
    print(f"picture: {picture}")
    return 0


def run_side_by_side(
    config: Path, out: Path, runs: Mapping[str, Sequence[str]], jobs: int
) -> list[Path]:
    """Make every run in a folder of its own, `jobs` at a time; returns the folders.

    A run that is finished is not made again; one that was interrupted continues from its last
    checkpoint.  Progress goes to standard output, each run's console to OUT/NAME.log.

    Args:
        config: configuration file of all runs.
        runs: name -> overrides.
        jobs: runs at the same time.

    Raises:
        UserError: a folder holds a run of another configuration.
        RunStopped: a run failed; the others are ended.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{out}: {error.strerror}; choose another --out") from None
    folders = {name: out / name for name in runs}
    arguments = {name: [*given, f"run_dir={folders[name]}"] for name, given in runs.items()}
    configs = {name: load(config, given) for name, given in arguments.items()}
    waiting = [name for name, one in configs.items() if not _is_finished(one)]
    progress = _Progress({name: configs[name] for name in waiting}, len(runs))
    running: dict[str, Child] = {}
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                name = waiting.pop(0)
                command = [sys.executable, "-m", "megatron_gpc", "train", str(config)]
                running[name] = Child([*command, *arguments[name]], log=out / f"{name}.log")
            time.sleep(POLL_S)
            for name in [name for name, run in running.items() if not run.alive()]:
                run = running.pop(name)
                if run.process.returncode:
                    raise RunStopped(f"{name} failed; {run.log} ends with\n{run.last_words()}")
                progress.done(name)
    finally:
        for run in running.values():
            run.process.terminate()
        for run in running.values():
            run.process.wait()
    return list(folders.values())


def _is_finished(config: Config) -> bool:
    """Whether the run has all its steps; False if it has not begun."""
    file = config.run_dir / "config.yaml"
    if not file.is_file():
        return False
    if _experiment(file.read_text()) != _experiment(dump(config)):
        raise UserError(
            f"{config.run_dir} holds a run of another configuration (see its config.yaml); choose "
            "another folder, or remove it"
        )
    if not (config.run_dir / FILE_NAME).is_file():
        return False
    run, steps = load_run(config.run_dir), config.train.steps
    evaluated = run.series("eval_reward").steps
    return steps in run.series("reward").steps and (
        config.eval.prompts is None or steps in evaluated
    )


def _experiment(text: str) -> dict[str, Any]:
    """What of a resolved configuration decides a run's numbers."""
    flat = flatten(yaml.safe_load(text))
    return {key: value for key, value in flat.items() if not key.startswith(NO_MATTER)}


class _Progress:
    """Says what is done and how long the rest will take, reckoned by training steps."""

    def __init__(self, todo: Mapping[str, Config], total: int):
        self.left = {name: config.train.steps for name, config in todo.items()}
        self.steps = sum(self.left.values())
        self.total = total
        self.begin = time.monotonic()
        found = total - len(todo)
        print(f"{len(todo)} runs of {self.steps} steps to make, {found} are there", flush=True)

    def done(self, name: str) -> None:
        del self.left[name]
        missing = sum(self.left.values())
        seconds = time.monotonic() - self.begin
        rest = seconds * missing / (self.steps - missing)
        took, left = (timedelta(seconds=round(s)) for s in (seconds, rest))
        number = self.total - len(self.left)
        print(f"{number:3} of {self.total}  {name:24} {took} so far, {left} left", flush=True)
