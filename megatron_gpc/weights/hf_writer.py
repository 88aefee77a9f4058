"""Writing Hugging Face checkpoint folders, a tensor at a time.

Tensor after tensor is appended behind room that is kept for the header, so that no more than one is
in memory (hf_files.py describes the format).
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from megatron_gpc.errors import UserError
from megatron_gpc.run.files import replacing
from megatron_gpc.weights.folders import carry_over, new_folder
from megatron_gpc.weights.hf_files import FILE_DTYPES, INDEX, SINGLE, all_finite, bytes_of

_DTYPE_NAMES = {dtype: name for name, dtype in FILE_DTYPES.items()}

_HEADER_BYTES = 2**18
"""Room for the JSON of a shard: about 2000 tensors; then the next one begins."""
SINGLE_HEADER_BYTES = 2**23
"""Room for the JSON of the one file that `write_single` makes: about 60,000 tensors."""


def write_hf(
    folder: Path,
    tensors: Iterable[tuple[str, Tensor]],
    *,
    source: Path,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = 5_000_000_000,
) -> None:
    """Write a checkpoint folder that `from_pretrained` and SGLang load as it is.

    It appears whole or not at all (`folders.new_folder`).

    Args:
        folder: absent or empty.
        tensors: Hugging Face names and tensors; consumed one by one.
        source: folder whose configuration, tokenizer, chat template and licence go along.
        dtype: convert to this, and say so in config.json; None: every tensor as it comes.
        max_shard_bytes: a file that would grow larger is followed by another, and an index.

    Raises:
        UserError: folder is not empty, source has no config.json, a dtype not in `FILE_DTYPES`,
            a name that comes twice, or the disk is full.
    """
    with new_folder(Path(folder)) as partial:
        carry_over(Path(source), partial, dtype)
        _write_shards(partial, tensors, dtype, max_shard_bytes)


def write_single(
    folder: Path, tensors: Iterable[tuple[str, Tensor]], header_bytes: int = SINGLE_HEADER_BYTES
) -> int:
    """Put `model.safetensors` into an existing folder, in place of an older one.

    For weight sync: quick, because it does not wait for the disk; and a reader finds the old file
    or the new one, never a mixture.

    Args:
        header_bytes: room for the JSON that describes the tensors.

    Returns:
        The room that the same tensors need, should they come again.

    Raises:
        UserError: as `write_hf`.
    """
    final = Path(folder) / SINGLE
    try:
        with replacing(final) as partial, partial.open("wb") as file:
            writer = _Shard(file, header_bytes)
            for name, tensor in tensors:
                writer.add(name, _plain(name, tensor, None))
            writer.finish()
        return -(-writer.json_bytes // 8) * 8  # tensors stand at multiples of 8 bytes
    except OSError as error:
        raise UserError(f"{final}: cannot be written: {error.strerror}") from None


class _Shard:
    """One safetensors file in the making: room for the header, then tensors as they come."""

    def __init__(self, file: BinaryIO, header_bytes: int) -> None:
        self.file, self.header_bytes = file, header_bytes
        self.entries = ['"__metadata__": {"format": "pt"}']
        self.data_bytes, self.json_bytes = 0, len(self.entries[0]) + 2
        file.seek(8 + header_bytes)

    def fits(self, name: str, tensor: Tensor) -> bool:
        """Whether the header has room for the tensor, and the data an aligned place."""
        text = self._entry(name, tensor)
        return (
            self.json_bytes + len(text) + 2 <= self.header_bytes
            and self.data_bytes % tensor.itemsize == 0
        )

    def add(self, name: str, tensor: Tensor) -> None:
        """Append a contiguous CPU tensor.

        Raises:
            UserError: it does not fit, or the disk is full.
        """
        if not self.fits(name, tensor):
            raise UserError(f"{self.file.name}: no room for tensor {name} in one safetensors file")
        try:
            self.file.write(bytes_of(tensor))
        except OSError as error:
            raise UserError(
                f"{self.file.name}: cannot write tensor {name}: {error.strerror}"
            ) from None
        self.entries.append(self._entry(name, tensor))
        self.json_bytes += len(self.entries[-1]) + 2
        self.data_bytes += tensor.nbytes

    def finish(self) -> None:
        """Write the header.  Spaces fill it up: the format allows them, and offsets stay put."""
        text = "{" + ", ".join(self.entries) + "}"
        self.file.seek(0)
        self.file.write(self.header_bytes.to_bytes(8, "little"))
        self.file.write(text.encode().ljust(self.header_bytes))
        self.file.flush()

    def _entry(self, name: str, tensor: Tensor) -> str:
        value = {
            "dtype": _DTYPE_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [self.data_bytes, self.data_bytes + tensor.nbytes],
        }
        return f"{json.dumps(name)}: {json.dumps(value)}"


def _write_shards(
    folder: Path,
    tensors: Iterable[tuple[str, Tensor]],
    dtype: torch.dtype | None,
    max_shard_bytes: int,
) -> None:
    """Files of at most max_shard_bytes, then the index if there is more than one."""
    shard_of: dict[str, int] = {}
    total_bytes = count = 0
    with contextlib.ExitStack() as stack:
        shard = None
        for name, tensor in tensors:
            if name in shard_of:
                raise UserError(f"tensor {name} comes twice")
            tensor = _plain(name, tensor, dtype)
            if (
                shard is None
                or not shard.fits(name, tensor)
                or (shard.data_bytes and shard.data_bytes + tensor.nbytes > max_shard_bytes)
            ):
                if shard is not None:
                    _settle(shard)
                stack.close()
                count += 1
                file = stack.enter_context((folder / f"{count}.partial").open("wb"))
                shard = _Shard(file, _HEADER_BYTES)
            shard.add(name, tensor)
            shard_of[name] = count
            total_bytes += tensor.nbytes
            del tensor  # before the next one is made
        if shard is None:
            raise UserError(f"{folder}: no tensors to write")
        _settle(shard)
    names = (
        [SINGLE]
        if count == 1
        else [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]
    )
    for i, name in enumerate(names, start=1):
        (folder / f"{i}.partial").rename(folder / name)
    if count > 1:
        index = {
            "metadata": {"total_size": total_bytes},
            "weight_map": {name: names[i - 1] for name, i in sorted(shard_of.items())},
        }
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def _settle(shard: _Shard) -> None:
    """Finish the file and wait for the disk: the folder's new name must not outrun its content."""
    shard.finish()
    os.fsync(shard.file.fileno())


def cast(name: str, tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    """The tensor in another dtype; the same tensor if it has that dtype, or dtype is None.

    Raises:
        UserError: a finite number becomes infinite, as large ones do in float16.
    """
    if dtype is None or tensor.dtype is dtype:
        return tensor
    made = tensor.to(dtype)
    narrower = torch.finfo(dtype).max < torch.finfo(tensor.dtype).max
    if narrower and not all_finite(made) and all_finite(tensor):
        raise UserError(
            f"{name} has numbers as large as {tensor.abs().max().item():.3g}, which "
            f"{dtype} cannot represent; choose float32 or bfloat16"
        )
    return made


def _plain(name: str, tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    """On the CPU, contiguous, in a dtype that a checkpoint may have."""
    if tensor.dtype not in _DTYPE_NAMES:
        raise UserError(f"{name} is {tensor.dtype}; a checkpoint holds float32, bfloat16, float16")
    return cast(name, tensor.detach(), dtype).cpu().contiguous()
