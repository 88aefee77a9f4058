"""`megatron-gpc init DIR`: a run that works as it is, to be changed into one's own."""

from __future__ import annotations

import importlib.resources
from pathlib import Path

from megatron_gpc.errors import UserError

FILES = ("config.yaml", "prompts.jsonl", "reward.py", "build_model.py")
"""In the order in which one would read them."""


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
        if file.exists() or file.is_symlink():
            raise UserError(f"{file} exists already; name another folder, or remove it first")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for file in files:
            file.write_text((start / file.name).read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{folder}: cannot be written to: {error}") from None
    return files
