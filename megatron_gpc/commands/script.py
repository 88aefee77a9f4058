"""What the scripts of tools/ share: exit codes, signals, a progress bar."""

from __future__ import annotations

import math
import signal
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TimeRemainingColumn

from megatron_gpc.errors import UserError
from megatron_gpc.weights import Place

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
"""What `--dtype` takes."""


def run(main: Callable[[], int]) -> int:
    """Call a script's main function.

    Returns:
        What main returns; 2 if the input cannot be used (said in one line, no traceback); 130
        if SIGINT or SIGTERM ended it, after what was half done has been removed.
    """
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        return main()
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def positive(kind: type[int] | type[float]) -> Callable[[str], int | float]:
    """For argparse's `type`: a number above zero."""

    def parse(text: str) -> int | float:
        value = kind(text)
        if not value > 0:
            raise ValueError(text)
        return value

    parse.__name__ = f"positive {kind.__name__}"  # argparse puts it into its message
    return parse


@contextmanager
def progress(title: str) -> Iterator[Callable[[Sequence[Place]], Iterable[Place]]]:
    """A bar on stderr for the time of the block, by bytes; gives what `convert` calls `track`."""
    columns = (title, BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as bar:

        def track(places: Sequence[Place]) -> Iterator[Place]:
            sizes = [math.prod(place.param.shape) for place in places]
            task = bar.add_task(title, total=sum(sizes))
            for place, size in zip(places, sizes, strict=True):
                yield place
                bar.advance(task, size)

        yield track
