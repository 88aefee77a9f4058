"""Write a run to start from.

Writes config.yaml, prompts.jsonl, reward.py and build_model.py (makes a tiny model) into a folder.
The run works as it is; change the files into your own.
"""

from __future__ import annotations

import argparse
import importlib.resources
import shlex
from pathlib import Path

from megatron_gpc.errors import UserError
from megatron_gpc.run.files import check_new, replace_text

FILES = ("config.yaml", "prompts.jsonl", "reward.py", "build_model.py")
"""In the order in which one would read them."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", type=Path, metavar="DIR", help="folder; made if it is missing")


def run(arguments: argparse.Namespace) -> int:
    for file in init(arguments.folder):
        print(file)
    print(f"now: megatron-gpc train {shlex.quote(str(arguments.folder / 'config.yaml'))}")
    return 0


def init(folder: Path) -> list[Path]:
    """Write FILES into a folder, which is made if it is missing.

    Returns:
        The files written.

    Raises:
        UserError: one of them exists already (none is written then), or the folder cannot be
            written to.
    """
    start = importlib.resources.files("megatron_gpc.commands") / "start"
    files = [folder / name for name in FILES]
    for file in files:
        check_new("init", file)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for file in files:
            replace_text(file, (start / file.name).read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{folder}: cannot be written to: {error}") from None
    return files
