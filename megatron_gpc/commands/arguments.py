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


def number(
    kind: type[int] | type[float], low: float, high: float = 1e9
) -> Callable[[str], int | float]:
    """For argparse's `type`: a number from low to high."""
    what = f"a {'whole ' * (kind is int)}number from {low:g} to {high:g}"

    def parse(text: str) -> int | float:
        try:
            value = kind(text)
        except ValueError:
            value = None
        if value is None or not low <= value <= high:
            raise argparse.ArgumentTypeError(f"expected {what}, got {text[:60]!r}")
        return value

    return parse
