"""Folders that appear whole or not at all, and what goes along with a checkpoint's weights."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch

from megatron_gpc.errors import UserError
from megatron_gpc.run.files import check_regular, read_json

FORMAT, COMMON = "metadata.json", "common.pt"
"""Files of megatron-core's checkpoints: what marks one, and what of it is not sharded."""
_CARRIED = (
    *("config.json", "generation_config.json", "tokenizer*", "vocab.*", "merges.txt"),
    *("special_tokens_map.json", "added_tokens.json", "chat_template*", "*.tiktoken"),
    *("LICENSE*", "NOTICE*"),
)


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """A hidden folder beside `folder`, to be written to; it takes that name when the block ends.

    A reader never sees half of it, and when the block is left by an error or an interrupt nothing
    stays.  Only SIGKILL or a power cut can leave the hidden folder, which no tool reads.

    Args:
        folder: absent or empty.

    Raises:
        UserError: folder is not empty, or something cannot be written.
    """
    taken = folder.exists() and (not folder.is_dir() or any(folder.iterdir()))
    if taken or folder.is_symlink():  # a folder cannot be renamed to it
        raise UserError(f"{folder} is not an empty folder; give another, or remove it first")
    final = folder.absolute()
    partial = final.parent / f".{final.name}.partial-{os.getpid()}"
    missing = [parent for parent in final.parents if not parent.exists()]
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        partial.mkdir()
        yield partial
        partial.rename(final)
    except OSError as error:
        raise UserError(f"{folder}: cannot be written: {error.strerror}") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        with suppress(OSError):  # raised by the first that is not empty: all of them after success
            for parent in missing:
                parent.rmdir()


def carry_over(source: Path, folder: Path, dtype: torch.dtype | None = None) -> None:
    """Copy what a checkpoint holds besides weights: configuration, tokenizer, template, licence.

    Args:
        dtype: what config.json shall say.  If it says so already, or with None, config.json is
            copied byte for byte.

    Raises:
        UserError: source has no config.json.
    """
    if not (source / "config.json").is_file():
        raise UserError(f"{source} has no config.json")
    for pattern in _CARRIED:
        for file in source.glob(pattern):
            if file.is_file():
                shutil.copyfile(file, folder / file.name)
    if dtype is not None:
        config = read_json(folder / "config.json")
        name = str(dtype).removeprefix("torch.")
        said = {key: name for key in ("torch_dtype", "dtype") if key in config} or {"dtype": name}
        if any(config.get(key) != name for key in said):
            text = json.dumps({**config, **said}, indent=2)
            (folder / "config.json").write_text(text + "\n")


def first_few(names: Sequence[str]) -> str:
    """The first few of many names."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def is_converted(folder: Path) -> bool:
    """Whether it is a converted checkpoint (weights/convert.py) and not a Hugging Face folder."""
    return (folder / FORMAT).is_file() and not (folder / "config.json").is_file()


def hf_folder(folder: Path) -> Path:
    """Where a model's configuration and tokenizer lie: of a converted checkpoint in its `hf/`."""
    return folder / "hf" if is_converted(folder) else folder


def read_hf_config(folder: Path) -> dict[str, Any]:
    """config.json of a Hugging Face checkpoint, or of a converted one.

    Raises:
        UserError: the folder or the file is missing or unreadable.
    """
    inside = hf_folder(folder)
    try:
        for file in inside.iterdir():  # weights, tokenizer and templates that others will open
            if not file.is_dir():
                check_regular(file)
        return read_json(inside / "config.json")
    except FileNotFoundError:
        raise UserError(
            f"{folder} is not a Hugging Face checkpoint (no config.json) and not a converted one; "
            "give the folder of one"
        ) from None
    except OSError as error:
        raise UserError(f"{inside}: cannot be read: {error.strerror}") from None
