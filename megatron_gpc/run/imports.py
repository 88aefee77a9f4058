"""Imports of many modules at once."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def many_imports() -> Iterator[None]:
    """The garbage collector rests meanwhile, and never looks at what they have made.

    It would search a million objects that live as long as the process, again and again: a fifth of
    the time until a rank or a server works, and a pause of every collection afterwards.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
        gc.freeze()
