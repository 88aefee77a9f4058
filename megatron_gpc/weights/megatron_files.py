"""megatron-core's distributed checkpoints (`torch_dist`), a tensor at a time and by one process.

    .metadata        torch.distributed.checkpoint's: every key's shape and dtype, and which piece of
                     it lies where in which file
    *.distcp         the pieces, each as torch.save writes it, one behind the other
    metadata.json    megatron-core's: which format this is
    common.pt        megatron-core's: what is not sharded; empty when we write it

Pieces are those that megatron-core itself saves without parallelism, and it loads them at any
layout.  Not written: `_extra_state`, which holds fp8 scales and is empty otherwise.
"""

from __future__ import annotations

import itertools
import json
import os
import pickle
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor
from torch.distributed.checkpoint import (
    ChunkStorageMetadata,
    DefaultLoadPlanner,
    FileSystemReader,
    FileSystemWriter,
    LoadPlan,
    ReadItem,
    SavePlan,
    TensorStorageMetadata,
    WriteItem,
)
from torch.distributed.checkpoint.default_planner import create_default_global_save_plan
from torch.distributed.checkpoint.filesystem import SerializationFormat, _write_item
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItemType
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list
from torch.distributed.checkpoint.storage import WriteResult

from megatron_gpc.errors import UserError
from megatron_gpc.run.files import read_json
from megatron_gpc.weights.folders import COMMON, FORMAT, first_few
from megatron_gpc.weights.metadata_file import read_metadata
from megatron_gpc.weights.places import Place

METADATA = ".metadata"
_FORMAT = {
    "sharded_backend": "torch_dist",
    "sharded_backend_version": 1,
    "common_backend": "torch",
    "common_backend_version": 1,
}
_WEIGHT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_UNREADABLE = (
    *(OSError, EOFError, RuntimeError, pickle.UnpicklingError, AssertionError, AttributeError),
    *(ImportError, LookupError, TypeError, ValueError),
)
"""What unpickling and torch's reader raise if a file is damaged."""
_MODEL = ("embedding.", "decoder.", "output_layer.")
"""How keys of the model begin; the others are the optimizer's."""


class MegatronReader:
    """The model's tensors of a checkpoint, whoever saved it and at whatever layout.

    Opening reads the description only: a pickle, as megatron-core's always is, which may have
    nothing but the classes of a description.

    Raises:
        UserError: no such folder, not a distributed checkpoint, or an unreadable description.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = Path(folder)
        _check_format(self.folder)
        self._reader = FileSystemReader(self.folder)
        file = self.folder / METADATA
        metadata = read_metadata(file)
        if not isinstance(metadata, Metadata) or not metadata.storage_data:
            raise UserError(f"{file}: not a checkpoint's description")
        self._reader.set_up_storage_reader(metadata, is_coordinator=True)
        self._tensors = {
            key: value
            for key, value in metadata.state_dict_metadata.items()
            if key.startswith(_MODEL) and isinstance(value, TensorStorageMetadata)
        }
        self._pieces: dict[str, dict[tuple[int, ...], list[ChunkStorageMetadata]]] = {}

    def dtypes(self) -> set[torch.dtype]:
        """Of the model's tensors."""
        return {tensor.properties.dtype for tensor in self._tensors.values()}

    def check(self, places: Sequence[Place]) -> None:
        """Hold the checkpoint to a model's table; reads no data.

        Raises:
            UserError: missing, surplus, misshapen or incomplete tensors, a dtype that weights
                cannot have, an absent or truncated file; by key and file.
        """
        missing = [
            f"{place.key} (for {', '.join(place.param.hf)})"
            for place in places
            if place.key not in self._tensors
        ]
        if missing:
            raise UserError(f"{self.folder} lacks {first_few(missing)}")
        surplus = sorted(set(self._tensors) - {place.key for place in places})
        if surplus:
            raise UserError(
                f"{self.folder} has tensors that the model's config.json leaves no place for: "
                f"{first_few(surplus)}"
            )
        sizes = {file.name: file.stat().st_size for file in self.folder.glob("*.distcp")}
        for place in places:
            self._check_shape(place)
            for item in self._items(place):
                self._check_piece(place, item, sizes)

    def get(self, place: Place) -> Tensor:
        """Read one parameter, [param.shape]; rows that pad the vocabulary are not read but zero.

        Raises:
            UserError: it is not there, or a file cannot be read.
        """
        whole = torch.zeros(place.param.shape, dtype=self._tensors[place.key].properties.dtype)
        into = _Into(whole.view(*(1 for _ in place.index), *whole.shape))
        try:
            self._reader.read_data(LoadPlan(self._items(place)), into)
        except _UNREADABLE as error:
            files = {self._file(item).name for item in self._items(place)}
            raise UserError(
                f"{self.folder / ', '.join(sorted(files))}: cannot read {place}: "
                f"{str(error).splitlines()[0] if str(error) else type(error).__name__}"
            ) from None
        return whole

    def _check_shape(self, place: Place) -> None:
        stored = self._tensors[place.key]
        expected, found = list(place.global_shape), list(stored.size)
        if place.param.kind == "vocab":  # padded as the layout that saved it wanted
            rows = place.param.hf_shapes[0][0]
            fits = len(found) == 2 and found[0] >= rows and found[1:] == expected[1:]
            expected[0] = rows
        else:
            fits = found == expected
        if not fits:
            raise UserError(
                f"{place.key} in {self.folder} has shape {found}, but the model's config.json says "
                f"{expected}"
            )
        if stored.properties.dtype not in _WEIGHT_DTYPES:
            raise UserError(
                f"{place.key} in {self.folder} is {stored.properties.dtype}; only float32, "
                "bfloat16, float16 are supported"
            )

    def _check_piece(self, place: Place, item: ReadItem, sizes: dict[str, int]) -> None:
        if item.storage_index not in self._reader.storage_data:
            raise UserError(f"{self.folder / METADATA} does not say which file holds {place}")
        file = self._file(item)
        stored = self._reader.storage_data[item.storage_index]
        if file.name not in sizes:
            raise UserError(f"{file} (with {place}) is absent")
        if sizes[file.name] < stored.offset + stored.length:
            raise UserError(f"{file} ends inside {place}: it is truncated")

    def _file(self, item: ReadItem) -> Path:
        return self.folder / self._reader.storage_data[item.storage_index].relative_path

    def _items(self, place: Place) -> list[ReadItem]:
        """What to read for a parameter: one entry a stored piece that it overlaps."""
        stored = self._tensors[place.key]
        if place.key not in self._pieces:  # or every expert would search all
            self._pieces[place.key] = _by_index(stored, len(place.index))
        shape = place.param.shape
        if place.param.kind == "vocab":
            shape = place.param.hf_shapes[0]
        wanted = ChunkStorageMetadata(
            offsets=torch.Size((*place.index, *(0 for _ in shape))),
            sizes=torch.Size((*(1 for _ in place.index), *shape)),
        )
        pieces = self._pieces[place.key].get(place.index, [])
        items = create_read_items_for_chunk_list(
            place.key, TensorStorageMetadata(stored.properties, stored.size, pieces), [wanted]
        )
        if sum(item.lengths.numel() for item in items) != wanted.sizes.numel():
            raise UserError(
                f"{place} in {self.folder} is not complete: a rank's part was not saved"
            )
        return items


class _Into(DefaultLoadPlanner):
    """Tells the library to put what it reads into one tensor."""

    def __init__(self, whole: Tensor) -> None:
        super().__init__()
        self.whole = whole

    def resolve_tensor(self, read_item: ReadItem) -> Tensor:
        ends = zip(read_item.dest_offsets, read_item.lengths, strict=True)
        return self.whole[tuple(slice(start, start + length) for start, length in ends)]

    def commit_tensor(self, read_item: ReadItem, tensor: Tensor) -> None:
        """Nothing: the tensor is part of `whole`."""


def write_megatron(
    folder: Path, tensors: Iterable[tuple[Place, Tensor]], max_file_bytes: int = 4 * 2**30
) -> None:
    """Write a checkpoint into an existing, empty folder.

    Args:
        tensors: places, and whole tensors [param.shape]; consumed one by one.
        max_file_bytes: a file that would grow larger is followed by another.

    Raises:
        UserError: a key with two dtypes, or the disk is full.
    """
    with _Writer(folder, max_file_bytes) as writer:
        for place, whole in tensors:
            writer.add(place, whole)
            del whole  # before the next one is made
        writer.finish()
    torch.save({}, folder / COMMON)
    (folder / FORMAT).write_text(json.dumps(_FORMAT))


class _Writer:
    """The `.distcp` files in the making, and then what describes them.

    torch's own writer holds on to every tensor of a file until the file is closed; this one lets a
    tensor go as soon as it is written.
    """

    def __init__(self, folder: Path, max_file_bytes: int) -> None:
        self.folder, self.max_file_bytes = folder, max_file_bytes
        self.torch = FileSystemWriter(folder)
        self.items: list[WriteItem] = []
        self.results: list[WriteResult] = []
        self.dtypes: dict[str, torch.dtype] = {}
        self.stream: BinaryIO | None = None
        self.files = 0

    def __enter__(self) -> _Writer:
        return self

    def __exit__(self, *_: object) -> None:
        if self.stream is not None:
            with suppress(OSError):  # a full disk is one once more; `finish` closed it otherwise
                self.stream.close()

    def add(self, place: Place, whole: Tensor) -> None:
        """Append a parameter.

        Raises:
            UserError: other layers have it in another dtype, or the disk is full.
        """
        if self.dtypes.setdefault(place.key, whole.dtype) is not whole.dtype:
            raise UserError(
                f"{place.param.hf[0]} is {whole.dtype}, but in other layers it is "
                f"{self.dtypes[place.key]}; megatron-core keeps both in one tensor, so choose one "
                "with --dtype"
            )
        for item, piece in _pieces(place, whole):
            try:
                stream, name = self._room(piece.nbytes)
                self.results.append(self._append(stream, name, item, piece))
            except OSError as error:
                raise UserError(
                    f"{self.folder}: cannot write {place} ({', '.join(place.param.hf)}): "
                    f"{error.strerror}"
                ) from None
            self.items.append(item)

    def finish(self) -> None:
        """Wait for the disk, then write the description."""
        self._settle()
        _, metadata = create_default_global_save_plan([SavePlan(self.items)])
        self.torch.finish(metadata, [self.results])

    def _room(self, nbytes: int) -> tuple[BinaryIO, str]:
        """A file that may grow by so much, and its name."""
        if self.stream is None or 0 < self.stream.tell() > self.max_file_bytes - nbytes:
            self._settle()
            self.files += 1
            self.stream = (self.folder / f"__0_{self.files - 1}.distcp").open("wb")
        return self.stream, f"__0_{self.files - 1}.distcp"

    def _settle(self) -> None:
        if self.stream is not None:
            self.stream.flush()
            os.fsync(self.stream.fileno())
            self.stream.close()

    def _append(self, stream: Any, name: str, item: WriteItem, piece: Tensor) -> WriteResult:
        try:
            return _write_item(
                self.torch.transforms, stream, piece, item, name, SerializationFormat.TORCH_SAVE
            )
        except RuntimeError as error:
            # torch.save's own error about the half-written file hides what cut it short: a full
            # disk, or Ctrl-C
            raise error.__context__ or error from None


def _pieces(place: Place, whole: Tensor) -> Iterator[tuple[WriteItem, Tensor]]:
    """Cut a parameter as megatron-core does: gate and up apart, or tensor parallelism could not."""
    start = 0
    for part in whole.chunk(2) if place.param.kind == "gate_up" else (whole,):
        offsets = torch.Size((*place.index, start, *(0 for _ in part.shape[1:])))
        sizes = torch.Size((*(1 for _ in place.index), *part.shape))
        start += len(part)
        data = TensorWriteData(
            ChunkStorageMetadata(offsets, sizes),
            TensorProperties(part.dtype),
            torch.Size(place.global_shape),
        )
        item = WriteItem(MetadataIndex(place.key, offsets), WriteItemType.SHARD, tensor_data=data)
        if part.nbytes < part.untyped_storage().nbytes():
            part = part.clone()  # torch.save would write all that it is a view of
        yield item, part.view(sizes)


def _by_index(
    stored: TensorStorageMetadata, dims: int
) -> dict[tuple[int, ...], list[ChunkStorageMetadata]]:
    """A key's pieces by their place along the first `dims` dimensions."""
    found = defaultdict(list)
    for piece in stored.chunks:
        spans = zip(piece.offsets[:dims], piece.sizes[:dims], strict=True)
        for index in itertools.product(*(range(start, start + n) for start, n in spans)):
            found[index].append(piece)
    return dict(found)


def _check_format(folder: Path) -> None:
    file = folder / FORMAT
    if not folder.is_dir():
        raise UserError(
            f"{folder}: no such folder; give a checkpoint's, such as RUN/checkpoints/step_000100"
        )
    try:
        backend = read_json(file)["sharded_backend"]
    except FileNotFoundError:
        inside = sorted(inner.parent for inner in folder.glob(f"*/{FORMAT}"))
        inside += sorted(inner.parent for inner in folder.glob(f"checkpoints/*/{FORMAT}"))
        hint = f"; did you mean {inside[-1]}?" if inside else ""
        raise UserError(
            f"{folder} is not a complete distributed checkpoint (no {FORMAT}){hint}"
        ) from None
    except (UserError, KeyError) as error:
        raise UserError(f"{file}: not a checkpoint's ({error!r})") from None
    if backend != _FORMAT["sharded_backend"]:
        raise UserError(f"{file}: format {backend!r} is not supported, only torch_dist")
