"""Reading Hugging Face checkpoint folders, a tensor at a time; hf_writer.py writes them.

A safetensors file is an 8-byte length, that many bytes of JSON, the header (name -> dtype, shape,
offsets), then the numbers.  They are read by ordinary reads and not through a memory map, whose
pages would count as this process's memory; no more than one tensor is in memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megatron_gpc.errors import UserError
from megatron_gpc.run.files import check_regular, parse_json, read_json
from megatron_gpc.weights.folders import first_few
from megatron_gpc.weights.table import Param

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"

FILE_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
"""safetensors' names of the dtypes that weights may have."""
SAMPLED_BYTES = 2**26
"""Of all tensors together that are looked at before anything starts: all of a small model."""


@dataclass(frozen=True)
class Entry:
    """Where a tensor lies."""

    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int
    """Where its first byte lies in the file."""
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
        buffer = bytes_of(tensor)
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


def check_finite(what: str, tensor: Tensor) -> None:
    """Refuse weights that are not numbers.

    Raises:
        UserError: names the tensor, as `what` does.
    """
    if tensor.numel() and not all_finite(tensor):
        raise UserError(
            f"{what} holds nan or infinity; fetch it again, or take an older checkpoint"
        )


def all_finite(tensor: Tensor) -> bool:
    return all(bool(extreme.isfinite()) for extreme in tensor.aminmax())


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


def bytes_of(tensor: Tensor) -> memoryview:
    """A contiguous tensor's memory."""
    array: Any = tensor.view(-1).view(torch.uint8).numpy()
    return memoryview(array)
