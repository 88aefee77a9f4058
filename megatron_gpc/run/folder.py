"""The folder of a run, before the run.

config.yaml      resolved configuration          checkpoints/   step_NNNNNN
metrics.jsonl    one object a training step      tensorboard/   the same as events
eval.jsonl       one object an evaluation        plots.png      drawn at the end (`plots`)
sync/            weights for the rollout server  logs/          server, ranks above 0
skipped/         mini-batches of updates that were left out
pages.json       by which id services know the run (metrics/sinks)
stopped.json     the run was asked to end, and did
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TextIO

from megatron_gpc.config import Config
from megatron_gpc.config.file import dump, flatten, plain
from megatron_gpc.config.plain_yaml import read_mapping
from megatron_gpc.errors import UserError
from megatron_gpc.run.child import Child
from megatron_gpc.run.files import by_step, replace_text
from megatron_gpc.run.launch import CHILD_POLL_S
from megatron_gpc.run.lock import PREPARING, take
from megatron_gpc.run.say import say
from megatron_gpc.run.stop import marker

Consequences = Callable[[Mapping[str, Any], Config, int], list[str]]
"""(a run's config.yaml, the configuration that it goes on with, finished steps) -> sentences."""


def prepare(config: Config, consequences: Consequences | None = None) -> TextIO:
    """Make the run's folder ready; one process calls it.

    Args:
        consequences: what else to say of a run that continues under another configuration.

    Returns:
        A lock, which keeps others from preparing the folder until this process ends.  Rank 0 takes
        another, which keeps them out until it ends.

    Raises:
        UserError: the folder cannot be made, its config.yaml is damaged, or another run is using
            it.
    """
    try:
        if config.run_dir.exists():  # refuse before anything of a run that has not ended is touched
            take(config.run_dir, PREPARING).close()
            take(config.run_dir).close()
        if config.resume == "none" and config.run_dir.exists():
            _set_aside(config)
        config.run_dir.mkdir(parents=True, exist_ok=True)
        held = take(config.run_dir, PREPARING)
        marker(config.run_dir).unlink(missing_ok=True)
        file = config.run_dir / "config.yaml"
        step = _newest_step(config.run_dir)
        if step is not None and file.exists():
            old = read_config(file)
            if changed := _changes(old, plain(config)):
                say(
                    "warning: continuing a run under another configuration; changed: "
                    + ", ".join(changed)
                )
                for one in consequences(old, config, step) if consequences else ():
                    say(f"warning: {one}")
        replace_text(file, dump(config))
    except OSError as error:
        raise UserError(f"run_dir: {config.run_dir}: {error.strerror}") from None
    return held


def _set_aside(config: Config) -> None:
    """Rename the run's folder to the first RUN.old-N that is free."""
    number = 1
    while (aside := config.run_dir.with_name(f"{config.run_dir.name}.old-{number}")).exists():
        number += 1
    config.run_dir.rename(aside)
    say(f"resume=none: the old run was set aside as {aside}")


def _newest_step(run_dir: Path) -> int | None:
    """Finished steps of the newest checkpoint; None if there is no checkpoint to continue from.
    A checkpoint that is being written has another name."""
    return max(by_step(run_dir / "checkpoints"), default=None)


def read_config(file: Path) -> dict[str, Any]:
    """A run's configuration so far, unchecked.

    Raises:
        UserError: the file is damaged.
    """
    try:
        return read_mapping(file)
    except UserError as error:
        raise UserError(f"{file} is damaged; remove it to continue the run: {error}") from None


def _changes(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """`clip.schedule static -> id` for every key that differs."""
    old, new = flatten(before), flatten(now)
    return [
        f"{key} {old.get(key)} -> {new.get(key)}"
        for key in dict.fromkeys([*new, *old])
        if old.get(key) != new.get(key)
    ]


def make_model(config: Config) -> None:
    """Run model.build if model.hf does not exist yet.

    Raises:
        UserError: there is no such script, or it failed.
    """
    model = config.model
    if model.build is None or model.hf.exists():
        return
    if not model.build.is_file():
        raise UserError(f"model.build: {model.build} does not exist")
    # The script has the machine to itself: a thread limit that was meant for ranks is not for it.
    environment = {k: v for k, v in os.environ.items() if k != "OMP_NUM_THREADS"}
    say(f"making the model with {model.build}, once: {model.hf}")
    building = Child([sys.executable, str(model.build), str(model.hf)], environment, session=True)
    try:
        # Not wait(): a signal that reaches another thread, or comes just before, does not end it.
        while (exit_code := building.process.poll()) is None:
            time.sleep(CHILD_POLL_S)
    except BaseException:
        building.end()
        raise
    if exit_code or not (model.hf / "config.json").is_file():
        raise UserError(
            f"model.build: {model.build} failed (exit code {exit_code}) or made no "
            f"checkpoint in {model.hf}"
        )
