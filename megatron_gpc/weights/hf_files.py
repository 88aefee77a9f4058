"""Hugging Face checkpoint folders, a tensor at a time.

A safetensors file is an 8-byte length, that many bytes of JSON (name -> dtype, shape, offsets),
then the numbers.  Reading goes through ordinary reads and not through a memory map, whose pages
would count as this process's memory; writing appends tensor after tensor behind room that is kept
for the JSON.  Either way no more than one tensor is in memory.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megatron_gpc.errors import UserError
from megatron_gpc.run.files import check_regular, parse_json, read_json
from megatron_gpc.weights.folders import carry_over, first_few, new_folder
from megatron_gpc.weights.table import Param

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"

FILE_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
"""safetensors' names of the dtypes that weights may have."""
_DTYPE_NAMES = {dtype: name for name, dtype in FILE_DTYPES.items()}

SAMPLED_BYTES = 2**26
"""Of all tensors together that are looked at before anything starts: all of a small model."""
_HEADER_BYTES = 2**18
"""Room for the JSON of a shard: about 2000 tensors; then the next one begins."""
_SINGLE_HEADER_BYTES = 2**23
"""Room for the JSON of the one file that `write_single` makes: about 60,000 tensors."""


@dataclass(frozen=True)
class Entry:
    """Where a tensor lies."""

    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int
    """Of its first byte in the file."""
    nbytes: int


class HFReader:
    """The tensors of a folder with `model.safetensors`, or with an index and its shards.

    Opening reads headers only.

    Raises:
        UserError: no weights, an index that contradicts its files, a truncated or foreign file, a
            dtype other than float32, bfloat16, float16.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = Path(folder)
        self.entries: dict[str, Entry] = {}
        index = self.folder / INDEX
        if index.exists() and (self.folder / SINGLE).exists():
            raise UserError(f"{self.folder} has both {SINGLE} and {INDEX}; remove the stale one")
        where = _read_index(index) if index.exists() else None
        for name in sorted(set(where.values())) if where else [SINGLE]:
            found = _read_header(self.folder / name, where)
            if where is not None:
                _compare_with_index(self.folder / name, found, where)
            self.entries.update(found)

    def __iter__(self) -> Iterator[str]:
        return iter(self.entries)

    def get(self, name: str) -> Tensor:
        """Read one tensor.

        Raises:
            UserError: there is none of that name, or the file cannot be read to its end.
        """
        if name not in self.entries:
            raise UserError(f"{self.folder} has no tensor {name}")
        entry = self.entries[name]
        tensor = torch.empty(entry.shape, dtype=entry.dtype)
        buffer = _bytes_of(tensor)
        try:
            with entry.file.open("rb", buffering=0) as file:
                file.seek(entry.offset)
                while buffer:  # one read gives at most 2 GiB
                    got = file.readinto(buffer)
                    if not got:
                        raise UserError(f"{entry.file} ends inside tensor {name}; fetch it again")
                    buffer = buffer[got:]
        except OSError as error:
            raise UserError(f"{entry.file}: cannot read tensor {name}: {error.strerror}") from None
        check_finite(f"{entry.file}: tensor {name}", tensor)
        return tensor

    def check(self, params: Sequence[Param], copies: Mapping[str, str] | None = None) -> None:
        """Hold the folder to a family's table; reads no data, but for `copies` and of every tensor
        the beginning, which must be finite (`get` holds all of it to that).

        Args:
            params: `family.params(config)`.
            copies: `family.copies(config)`: tensors that may be there if they equal another.

        Raises:
            UserError: missing, surplus or misshapen tensors, by name and file.
        """
        copies = copies or {}
        expected = {
            name: (shape, param.megatron)
            for param in params
            for name, shape in zip(param.hf, param.hf_shapes, strict=True)
        }
        missing = [
            f"{name} (for {expected[name][1]})" for name in expected if name not in self.entries
        ]
        if missing:
            raise UserError(f"{self.folder} lacks {first_few(missing)}")
        surplus = [
            f"{name} in {entry.file.name}"
            for name, entry in self.entries.items()
            if name not in expected and name not in copies
        ]
        if surplus:
            raise UserError(
                f"{self.folder} has tensors that its config.json leaves no place for: "
                f"{first_few(surplus)}"
            )
        for name, (shape, _) in expected.items():
            entry = self.entries[name]
            if entry.shape != shape:
                raise UserError(
                    f"{name} in {entry.file} has shape {list(entry.shape)}, but "
                    f"config.json says {list(shape)}"
                )
        self._check_beginnings()
        for name, original in copies.items():
            if name in self.entries and not torch.equal(self.get(name), self.get(original)):
                raise UserError(
                    f"{name} in {self.entries[name].file} differs from {original}, but config.json "
                    "ties them; set tie_word_embeddings to false to keep both"
                )

    def _check_beginnings(self) -> None:
        share = SAMPLED_BYTES // max(len(self.entries), 1)
        for name, entry in self.entries.items():
            size = min(share, entry.nbytes) // entry.dtype.itemsize * entry.dtype.itemsize
            if not size:
                continue
            try:
                with entry.file.open("rb") as file:
                    file.seek(entry.offset)
                    numbers = torch.frombuffer(bytearray(file.read(size)), dtype=entry.dtype)
            except (OSError, ValueError):  # `get` says it
                continue
            check_finite(f"{entry.file}: tensor {name}", numbers)


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


def write_single(folder: Path, tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Put `model.safetensors` into an existing folder, in place of an older one.

    For weight sync: quick, because it does not wait for the disk; and a reader finds the old file
    or the new one, never a mixture.

    Raises:
        UserError: as `write_hf`.
    """
    folder = Path(folder)
    partial = folder / f".{SINGLE}.partial-{os.getpid()}"
    try:
        with partial.open("wb") as file:
            writer = _Shard(file, _SINGLE_HEADER_BYTES)
            for name, tensor in tensors:
                writer.add(name, _plain(name, tensor, None))
            writer.finish()
        partial.replace(folder / SINGLE)
    except OSError as error:
        raise UserError(f"{folder / SINGLE}: cannot be written: {error.strerror}") from None
    finally:
        with contextlib.suppress(OSError):  # after success there is nothing to remove
            partial.unlink()


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
            self.file.write(_bytes_of(tensor))
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
    if narrower and not _finite(made) and _finite(tensor):
        raise UserError(
            f"{name} has numbers as large as {tensor.abs().max().item():.3g}, which "
            f"{dtype} cannot represent; choose float32 or bfloat16"
        )
    return made


def check_finite(what: str, tensor: Tensor) -> None:
    """Refuse weights that are not numbers.

    Raises:
        UserError: names the tensor, as `what` does.
    """
    if tensor.numel() and not _finite(tensor):
        raise UserError(
            f"{what} holds nan or infinity; fetch it again, or take an older checkpoint"
        )


def _finite(tensor: Tensor) -> bool:
    return all(bool(extreme.isfinite()) for extreme in tensor.aminmax())


def _plain(name: str, tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    """On the CPU, contiguous, in a dtype that a checkpoint may have."""
    if tensor.dtype not in _DTYPE_NAMES:
        raise UserError(f"{name} is {tensor.dtype}; a checkpoint holds float32, bfloat16, float16")
    return cast(name, tensor.detach(), dtype).cpu().contiguous()


def _read_index(index: Path) -> dict[str, str]:
    """Tensor name -> file name."""
    try:
        where = read_json(index)["weight_map"]
    except UserError as error:
        raise UserError(f"not an index of safetensors files: {error}") from None
    except KeyError:
        raise UserError(f"{index}: not an index of safetensors files: no weight_map") from None
    if not isinstance(where, dict) or not where:
        raise UserError(f"{index}: weight_map must be a mapping of tensors to files")
    for name, file in where.items():
        plain = isinstance(file, str) and file.isprintable() and 0 < len(file) < 200
        if not plain or Path(file).name != file:
            raise UserError(
                f"{index}: tensor {name}: {file!r:.100} is not the name of a file beside it"
            )
    return where


def _read_header(file: Path, where: Mapping[str, str] | None) -> dict[str, Entry]:
    """Every tensor of one file."""
    check_regular(file)
    try:
        with safe_open(file, "np"):  # "pt" would count the whole file as this process's memory
            pass  # the library holds header and length of the file against each other
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            header = parse_json(stream.read(length), str(file))
    except FileNotFoundError:
        if where is None:
            raise UserError(
                f"{file.parent} has neither {SINGLE} nor {INDEX}; only safetensors "
                "checkpoints are read"
            ) from None
        first = next(name for name, shard in where.items() if shard == file.name)
        raise UserError(
            f"{file.parent / INDEX} names {file.name} (for {first}), which is absent"
        ) from None
    except (SafetensorError, OSError) as error:
        raise UserError(
            f"{file}: truncated or not a safetensors file ({error}); fetch it again"
        ) from None
    header.pop("__metadata__", None)
    found = {}
    for name, entry in header.items():
        if entry["dtype"] not in FILE_DTYPES:
            raise UserError(
                f"{name} in {file} is {entry['dtype']}; only {', '.join(FILE_DTYPES)} are supported"
            )
        begin, end = entry["data_offsets"]
        dtype, shape = FILE_DTYPES[entry["dtype"]], tuple(entry["shape"])
        found[name] = Entry(file, dtype, shape, 8 + length + begin, end - begin)
    return found


def _compare_with_index(file: Path, found: Mapping[str, Entry], where: Mapping[str, str]) -> None:
    absent = [name for name, shard in where.items() if shard == file.name and name not in found]
    if absent:
        raise UserError(
            f"{file.parent / INDEX} says that {file.name} holds {first_few(absent)}, which it does "
            "not"
        )
    elsewhere = [name for name in found if where.get(name) != file.name]
    if elsewhere:
        raise UserError(f"{file} holds {first_few(elsewhere)}, which {INDEX} does not place there")


def _bytes_of(tensor: Tensor) -> memoryview:
    """A contiguous tensor's memory."""
    array: Any = tensor.view(-1).view(torch.uint8).numpy()
    return memoryview(array)
