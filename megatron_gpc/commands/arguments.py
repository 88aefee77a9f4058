"""What several commands take."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path


def add_configuration(parser: argparse.ArgumentParser) -> None:
    """`config` and `overrides`."""
    parser.add_argument("config", type=Path, help="YAML file")
    parser.add_argument(
        "overrides",
        nargs="*",
        default=[],
        metavar="key=value",
        help="replace a key of the file, such as clip.schedule=static",
    )


def positive(kind: type[int] | type[float]) -> Callable[[str], int | float]:
    """For argparse's `type`: a number above zero."""

    def parse(text: str) -> int | float:
        value = kind(text)
        if not value > 0:
            raise ValueError(text)
        return value

    parse.__name__ = f"positive {kind.__name__}"  # argparse puts it into its message
    return parse
