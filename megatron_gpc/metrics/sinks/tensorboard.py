"""TensorBoard: event files in the run's folder."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from megatron_gpc.metrics.sinks import tag


class TensorBoardSink:
    """Events in run_dir/tensorboard, under grouped tags."""

    def __init__(self, run_dir: Path, config: Mapping[str, Any], resume_step: int):
        # Here, because it takes a second or two that `train --dry-run` and `plot` need not wait.
        from torch.utils.tensorboard import SummaryWriter

        # The writer's own thread would say it as well, with a traceback, before a call here does.
        threading.excepthook = _not_of_tensorboard(threading.excepthook)
        # TensorBoard hides events from purge_step on that an earlier process wrote.
        self._events = SummaryWriter(str(run_dir / "tensorboard"), purge_step=resume_step + 1)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._events.add_scalar(tag(name), value, step)
        self._events.flush()  # a killed run does not write these steps again, see purge_step

    write_evaluation = write

    def close(self, ok: bool) -> None:
        self._events.close()


def _not_of_tensorboard(
    hook: Callable[[threading.ExceptHookArgs], object],
) -> Callable[[threading.ExceptHookArgs], object]:
    """A threading.excepthook that leaves out TensorBoard's threads."""

    def said(args: threading.ExceptHookArgs) -> None:
        if not type(args.thread).__module__.startswith("tensorboard."):
            hook(args)

    return said
