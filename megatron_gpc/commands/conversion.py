"""What both converters of checkpoints share."""

from __future__ import annotations

import math
import signal
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TimeRemainingColumn

from megatron_gpc.weights import Place

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
"""What `--dtype` takes."""


@contextmanager
def converting() -> Iterator[Callable[[Sequence[Place]], Iterable[Place]]]:
    """A bar on stderr for the time of the block, by bytes; gives what `convert` calls `track`.

    SIGTERM ends the block as Ctrl-C does, so that what is half done is removed.
    """
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    columns = ("converting", BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    with ExitStack() as shown:

        def track(places: Sequence[Place]) -> Iterator[Place]:
            # Not before: input that is refused gets its one line alone.
            bar = shown.enter_context(Progress(*columns, console=Console(stderr=True)))
            sizes = [math.prod(place.param.shape) for place in places]
            task = bar.add_task("converting", total=sum(sizes))
            for place, size in zip(places, sizes, strict=True):
                yield place
                bar.advance(task, size)

        yield track
