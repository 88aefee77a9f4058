"""Weights that another process of this host reads where they are: in shared memory, or on a GPU.

A bucket of tensors is one flat piece of memory.  What travels is a handle of it with names, shapes
and places, pickled as SGLang reads it (load_format="flattened_bucket"); `unpack` is the other end.
"""

from __future__ import annotations

import base64
import io
import os
import pickle
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Protocol

import torch
from torch.multiprocessing import reductions

from megatron_gpc.errors import UserError
from megatron_gpc.run.files import check_regular
from megatron_gpc.weights.unpickler import RestrictedUnpickler

Named = tuple[str, torch.Tensor]
FORMAT = "flattened_bucket"
_ALIGNMENT = 16
"""Of a tensor in a bucket [bytes]: whoever reads it looks at its bytes as its dtype."""
_HEADER_BYTES = 64
"""What torch keeps at the beginning of a named piece of memory; the other kind has it as well."""
_MEMFD = "memfd:megatron-gpc-weights"
MOST_READS = 10_000
"""Of one piece of named memory."""
_DEVICE, _COUNTER = 6, slice(11, 13)
"""Where torch's `reduce_tensor` has a GPU's number, and the counter of a reader."""
_READ_ERRORS = (
    *(OSError, ValueError, RuntimeError, TypeError, AttributeError, LookupError, MemoryError),
    *(pickle.UnpicklingError, EOFError, OverflowError),
)


class Memory(Protocol):
    """A flat piece of memory that others can open."""

    flat_B: torch.Tensor

    def handle(self) -> _Rebuilt:
        """For one reader."""
        ...

    def forget(self, handle: _Rebuilt) -> None:
        """Its reader will not say that it is done: it has failed, or is late."""
        ...


class _Rebuilt:
    """Pickles to a call of a function of torch's, which gives the tensor at the other end."""

    def __init__(self, function: Callable[..., Any], *arguments: object):
        self.call = (function, arguments)

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[object, ...]]:
        return self.call


class _HostMemory:
    def forget(self, handle: _Rebuilt) -> None:
        """Nothing: no reader is waited for."""


class FileMemory(_HostMemory):
    """Without a name: gone with this process, however that ends.  SGLang cannot open it."""

    def __init__(self, size: int):
        self._file = os.memfd_create(_MEMFD.partition(":")[2])
        self._path = f"/proc/{os.getpid()}/fd/{self._file}"
        os.ftruncate(self._file, _HEADER_BYTES + size)
        self.flat_B = _mapped(self._path, size, shared=True)

    def handle(self) -> _Rebuilt:
        return _on_host(b"", os.fsencode(self._path), len(self.flat_B))

    def close(self) -> None:
        os.close(self._file)


class NamedMemory(_HostMemory):
    """In /dev/shm, as torch shares memory between processes; torch removes it if we are killed.

    Raises:
        UserError: there is no room for it.
    """

    def __init__(self, size: int):
        os.set_inheritable(2, False)  # by torch's helper, which starts now and outlives us a moment
        try:
            self._storage: Any = torch.UntypedStorage._new_using_filename_cpu(size)
        except RuntimeError as error:
            reason = str(error).splitlines()[0]
            raise UserError(
                f"no room in /dev/shm for {size / 2**20:.0f} MiB of weights ({reason}); make it "
                "larger, or set rollout.server.bucket_mb lower or rollout.server.sync=disk"
            ) from None
        finally:
            os.set_inheritable(2, True)
        self._manager, self._name, _ = self._storage._share_filename_cpu_()
        for _ in range(MOST_READS):  # so that no reader is the last one, which would remove it
            self._storage._shared_incref()
        self.flat_B = torch.empty(0, dtype=torch.uint8).set_(self._storage)

    def handle(self) -> _Rebuilt:
        return _on_host(self._manager, self._name, len(self.flat_B))

    def close(self) -> None:
        Path(f"/dev/shm{os.fsdecode(self._name)}").unlink(missing_ok=True)


def _on_host(manager: bytes, name: bytes, size: int) -> _Rebuilt:
    storage = _Rebuilt(
        reductions.rebuild_storage_filename, torch.UntypedStorage, manager, name, size
    )
    typed = _Rebuilt(reductions.rebuild_typed_storage, storage, torch.uint8)
    return _Rebuilt(reductions.rebuild_tensor, torch.Tensor, typed, (0, (size,), (1,), False))


class Rooms:
    """Two pieces of the host's memory in turn, so that one is filled while the other is read.

    They are kept: new pages cost several times what a copy does.
    """

    def __init__(self, kind: type[FileMemory | NamedMemory]):
        self.kind = kind
        self.held: list[FileMemory | NamedMemory] = []

    def __call__(self, size: int) -> Memory:
        """Memory of at least so many bytes; what was in it is lost."""
        oldest = self.held.pop(0) if len(self.held) > 1 else None
        if oldest is None or len(oldest.flat_B) < size:
            if oldest is not None:
                oldest.close()
            oldest = self.kind(size)
        self.held.append(oldest)
        return oldest

    def close(self) -> None:
        while self.held:
            self.held.pop().close()


@contextmanager
def _plain_allocations() -> Iterator[None]:
    """Without expandable segments, which only a process that may trace this one could open."""
    torch_c: Any = torch._C
    names = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
    settings = next(filter(None, map(os.environ.get, names)), "")
    plain = settings.replace("expandable_segments:True", "expandable_segments:False")
    if plain != settings:
        torch_c._accelerator_setAllocatorSettings(plain)
    try:
        yield
    finally:
        if plain != settings:
            torch_c._accelerator_setAllocatorSettings(settings)


class DeviceMemory:
    """On a GPU (CUDA IPC).  torch keeps it until every reader has said that it is done."""

    def __init__(self, size: int):
        with _plain_allocations():
            self.flat_B = torch.empty(size, dtype=torch.uint8, device="cuda")

    def handle(self) -> _Rebuilt:
        """By the GPU's own name: the reader may count GPUs otherwise.  SGLang looks for it."""
        rebuild, arguments = reductions.reduce_tensor(self.flat_B)
        uuid = str(torch.cuda.get_device_properties(self.flat_B.device).uuid)
        return _Rebuilt(rebuild, *arguments[:_DEVICE], uuid, *arguments[_DEVICE + 1 :])

    def forget(self, handle: _Rebuilt) -> None:
        storage: Any = torch.UntypedStorage
        storage._release_ipc_counter_cuda(*handle.call[1][_COUNTER])


class Bucket:
    """Tensors in one piece of memory, which must stay as it is until all readers are done.

    Args:
        room: gives memory for so many bytes.
    """

    def __init__(self, named: Sequence[Named], room: Callable[[int], Memory]):
        places, end = [], 0
        for name, tensor in named:
            begin = -(-end // _ALIGNMENT) * _ALIGNMENT
            end = begin + tensor.nbytes
            places.append(_place(name, tensor.dtype, tensor.shape, begin, end))
        self.places, self.memory = places, room(max(end, 1))
        for place, (_, tensor) in zip(places, named, strict=True):
            _view(self.memory.flat_B, place).copy_(tensor.detach(), non_blocking=True)
        if any(tensor.is_cuda for _, tensor in named) and not self.memory.flat_B.is_cuda:
            torch.cuda.synchronize()
        self._handles: dict[str, _Rebuilt] = {}

    def payload(self) -> str:
        """For one rank of one engine, in base64."""
        handle = self.memory.handle()
        content = {"flattened_tensor": handle, "metadata": self.places}
        packed = base64.b64encode(pickle.dumps(content, protocol=4)).decode("ascii")
        self._handles[packed] = handle
        return packed

    def forget(self, payload: str) -> None:
        """Whoever it was for will not say that it is done."""
        self.memory.forget(self._handles[payload])


def _place(
    name: str, dtype: torch.dtype, shape: Sequence[int], begin: int, end: int
) -> SimpleNamespace:
    """In SGLang's names."""
    return SimpleNamespace(
        **{"name": name, "dtype": dtype, "shape": tuple(shape)},
        **{"start_idx": begin, "end_idx": end, "numel": end - begin},
    )


def _view(flat_B: torch.Tensor, place: SimpleNamespace) -> torch.Tensor:
    return flat_B[place.start_idx : place.end_idx].view(place.dtype).view(place.shape)


# ---- the other end ----


def unpack(serialized: str, /) -> list[Named]:
    """The tensors of a `payload`, where they are: they may only be read, until the sender is told.

    Raises:
        UserError: it is none, or its memory cannot be opened.
    """
    try:
        content = _HandleUnpickler(io.BytesIO(base64.b64decode(serialized, validate=True))).load()
        flat_B, places = content["flattened_tensor"], content["metadata"]
        assert isinstance(flat_B, torch.Tensor) and isinstance(places, list), "it is no bucket"
        return [_checked(flat_B, place) for place in places]
    except (*_READ_ERRORS, AssertionError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0][:300]
        raise UserError(f"serialized_named_tensors: {reason}") from None


def _checked(flat_B: torch.Tensor, place: Any) -> Named:
    assert isinstance(place, SimpleNamespace) and isinstance(place.name, str), "it has no names"
    begin, end = place.start_idx, place.end_idx
    inside = type(begin) is type(end) is int and 0 <= begin <= end <= len(flat_B)
    assert inside, f"{place.name[:200]} is not within the bucket"
    assert isinstance(place.dtype, torch.dtype), f"{place.name[:200]} has no dtype"
    return place.name, _view(flat_B, place)


def _mapped(path: str, size: int, shared: bool) -> torch.Tensor:
    whole_B = torch.from_file(path, shared, _HEADER_BYTES + size, dtype=torch.uint8)
    return whole_B[_HEADER_BYTES:]


def _open_on_host(_: object, manager: bytes, name: bytes, size: int) -> torch.Tensor:
    """Mapped for reading alone: torch's own way would also count, in whatever file it is told."""
    path = os.fsdecode(name)
    if re.fullmatch(r"/torch_\d+_\d+_\d+", path):
        path = f"/dev/shm{path}"
        check_regular(Path(path))
    elif not re.fullmatch(r"/proc/\d+/fd/\d+", path) or _MEMFD not in os.readlink(path):
        raise ValueError(f"{path[:200]} is no shared memory")
    now = os.stat(path)
    if type(size) is not int or not 0 < size <= now.st_size - _HEADER_BYTES:
        raise ValueError(f"{path} is smaller than it says")
    return _kept(path, size, now.st_dev, now.st_ino)


@lru_cache(maxsize=2)
def _kept(path: str, size: int, *_which: int) -> torch.Tensor:
    """Mapped once for many hand-overs, in the sender's two pieces: new pages cost as much as the
    copy."""
    return _mapped(path, size, shared=False)


def _open_on_device(*arguments: Any) -> torch.Tensor:
    uuids = [
        str(torch.cuda.get_device_properties(number).uuid)
        for number in range(torch.cuda.device_count())
    ]
    if arguments[_DEVICE] not in uuids:
        raise ValueError(f"its GPU {str(arguments[_DEVICE])[:80]} is none of this process's")
    number = uuids.index(arguments[_DEVICE])
    rebuilt: Any = reductions.rebuild_cuda_tensor
    return rebuilt(*arguments[:_DEVICE], number, *arguments[_DEVICE + 1 :])


class _HandleUnpickler(RestrictedUnpickler):
    """Opens memory in its own way, and makes nothing else but names and numbers."""

    allowed = {
        "torch": {"Tensor", "Size", "float32", "bfloat16", "float16", "uint8"},
        "torch.storage": {"TypedStorage", "UntypedStorage"},
        "types": {"SimpleNamespace"},
        "torch.multiprocessing.reductions": {
            *("rebuild_tensor", "rebuild_typed_storage"),
            *("rebuild_storage_filename", "rebuild_cuda_tensor"),
        },
    }
    own = {
        "rebuild_tensor": lambda kind, storage, metadata: storage,
        "rebuild_typed_storage": lambda storage, dtype: storage,
        "rebuild_storage_filename": _open_on_host,
        "rebuild_cuda_tensor": _open_on_device,
    }

    def find_class(self, module: str, name: str) -> Any:
        found = super().find_class(module, name)
        return self.own.get(name, found)
