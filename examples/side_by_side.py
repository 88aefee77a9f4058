"""Runs that do not need each other, side by side: for comparisons and studies."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

from megatron_gpc.config import Config
from megatron_gpc.config.file import flatten, load, plain
from megatron_gpc.errors import RunStopped, UserError
from megatron_gpc.metrics.jsonl import FILE_NAME
from megatron_gpc.metrics.runs import Run, load_run
from megatron_gpc.run.child import Child
from megatron_gpc.run.folder import make_model

POLL_S = 0.5
ROOT = Path(__file__).resolve().parents[1]
NO_MATTER = (
    *("run_dir", "resume", "timeout_s", "plots", "rollout.server.", "checkpoint.", "guard."),
    "log.",
)
"""Keys and sections that may differ between a run that is there and the one that is asked for."""


@dataclass(frozen=True, eq=False)
class Planned:
    """A run that a comparison asks for; its folder is OUT/ARM-SEED."""

    arm: str
    seed: int
    file: Path
    """Its configuration file."""
    overrides: tuple[str, ...]
    config: Config
    """What the two come to."""

    @property
    def name(self) -> str:
        return self.config.run_dir.name


def experiment(config: Config) -> dict[str, Any]:
    """What of a configuration decides a run's numbers; dotted keys."""
    flat = flatten(plain(config))
    return {key: value for key, value in flat.items() if not key.startswith(NO_MATTER)}


def finished_run(planned: Planned) -> Run | None:
    """The run, if it has all its steps and evaluations; None if not yet.

    Raises:
        UserError: its folder holds a run of another configuration, or is damaged.
    """
    folder = planned.config.run_dir
    file = folder / "config.yaml"
    if not file.exists():
        return None
    there, asked = experiment(load(file)), experiment(planned.config)
    for key in dict.fromkeys([*asked, *there]):
        if not _same(asked.get(key), there.get(key)):
            raise UserError(
                f"{folder} holds a run of another configuration: {key} is {there.get(key)} there, "
                f"and {asked.get(key)} is asked for; give the key=value that it was made with, or "
                "another --out"
            )
    if not (folder / FILE_NAME).exists():
        return None
    run = load_run(folder)
    evaluated = planned.config.eval.prompts is None or run.steps in run.series("eval_reward").steps
    return run if evaluated and run.steps in run.series("reward").steps else None


def _same(asked: Any, there: Any) -> bool:
    """A file of this checkout is the same in another, where the run may have been made."""
    if isinstance(asked, str) and isinstance(there, str) and asked.startswith(f"{ROOT}/"):
        return there.endswith(asked.removeprefix(str(ROOT)))
    return asked == there


def make_runs(planned: Sequence[Planned], jobs: int) -> None:
    """Make every run in its folder, `jobs` at a time.

    A run that is finished is not made again; one that was interrupted continues from its last
    checkpoint.  Progress goes to standard output, each run's console to OUT/ARM-SEED.log.

    Raises:
        UserError: a folder holds a run of another configuration, or cannot be made.
        RunStopped: a run failed; the others are ended.
    """
    waiting = [one for one in planned if finished_run(one) is None]
    for config in {one.config.model: one.config for one in waiting}.values():
        make_model(config)  # once, before runs that would all do
    progress = _Progress(waiting, len(planned))
    running: dict[Planned, Child] = {}
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                one = waiting.pop(0)
                running[one] = _start(one)
            time.sleep(POLL_S)
            for one in [one for one, run in running.items() if not run.alive()]:
                run = running.pop(one)
                if run.process.returncode:
                    raise RunStopped(f"{one.name} failed; {run.log} ends with\n{run.last_words()}")
                progress.done(one)
    finally:
        for run in running.values():
            run.process.terminate()
        for run in running.values():
            run.process.wait()


def _start(planned: Planned) -> Child:
    log = planned.config.run_dir.with_name(f"{planned.name}.log")
    command = [sys.executable, "-m", "megatron_gpc", "train", str(planned.file)]
    try:
        log.parent.mkdir(parents=True, exist_ok=True)
        return Child([*command, *planned.overrides], log=log)
    except OSError as error:
        raise UserError(f"{log}: {error.strerror}; choose another --out") from None


class _Progress:
    """Says what is done and how long the rest will take, reckoned by training steps."""

    def __init__(self, todo: Sequence[Planned], total: int):
        self.left = {one.name: one.config.train.steps for one in todo}
        self.steps = sum(self.left.values())
        self.total = total
        self.begin = time.monotonic()
        found = total - len(todo)
        print(f"{len(todo)} runs of {self.steps} steps to make, {found} are there", flush=True)

    def done(self, made: Planned) -> None:
        del self.left[made.name]
        missing = sum(self.left.values())
        seconds = time.monotonic() - self.begin
        rest = seconds * missing / (self.steps - missing)
        took, left = (timedelta(seconds=round(s)) for s in (seconds, rest))
        number = self.total - len(self.left)
        print(f"{number:3} of {self.total}  {made.name:24} {took} so far, {left} left", flush=True)
