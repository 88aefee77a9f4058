"""The three ways in which new weights reach the engines.

All take the policy's tensors as they are gathered, bucket by bucket, so that the trainer never
holds a second copy of the model; all run on the thread that the gathering's collectives belong to.
An engine that fails is left to the supervision in engines.py; the others go on.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Protocol

import torch
import torch.distributed as dist

from megatron_gpc.config import ServerConfig
from megatron_gpc.engines.client import pack_tensors
from megatron_gpc.engines.fleet import Engine, Fleet
from megatron_gpc.engines.process import EmbeddedServer
from megatron_gpc.engines.weight_group import join_group, leave_group
from megatron_gpc.run.say import say
from megatron_gpc.weights import SINGLE_HEADER_BYTES, write_single
from megatron_gpc.weights.handles import (
    FORMAT,
    Bucket,
    DeviceMemory,
    FileMemory,
    Memory,
    Named,
    NamedMemory,
    Rooms,
)

HOST_BUCKET_BYTES = 64 * 2**20
"""Of a bucket in the host's memory, unless rollout.server.bucket_mb is less: requests cost little
then, and most of the time one bucket is packed while another is read."""
_numbers = itertools.count()  # torch wants a name of its own for every group of a process


class WeightSync(Protocol):
    """A way to hand over weights."""

    def push(self, tensors: Iterable[Named], name: str) -> None:
        """Give every living engine the weights; consumes all tensors whatever happens.

        Args:
            name: what engines are to call them, see fleet.name_of.

        Raises:
            UserError: the shared folder cannot be written.
        """

    def close(self) -> None: ...


def make_sync(config: ServerConfig, fleet: Fleet, folder: Path) -> WeightSync:
    """The configured way.

    Args:
        folder: where `disk` puts model.safetensors; engines see it under the same path.
    """
    if config.sync == "disk":
        return DiskSync(fleet, folder)
    if config.sync == "tensor":
        return TensorSync(fleet, config.bucket_mb * 2**20)
    return DistributedSync(fleet, config.bucket_mb * 2**20, config.sync_timeout_s)


def read_folder(fleet: Fleet, folder: Path, name: str) -> None:
    """Have every living engine read its weights from a Hugging Face folder."""
    path, members = str(folder), fleet.alive()
    fleet.current = (path, name)
    fleet.each(members, lambda engine: engine.client.update_weights_from_disk(path, name))
    fleet.confirm(members, name)


class DiskSync:
    """Safetensors in a shared folder.  A restarted engine finds the current weights there."""

    def __init__(self, fleet: Fleet, folder: Path):
        self.fleet, self.folder = fleet, folder
        self.header_bytes = SINGLE_HEADER_BYTES  # until a hand-over has shown what is needed

    def push(self, tensors: Iterable[Named], name: str) -> None:
        self.header_bytes = write_single(self.folder, tensors, self.header_bytes)
        read_folder(self.fleet, self.folder, name)

    def close(self) -> None:
        pass


class TensorSync:
    """Tensors that engines of this host read where they are; inside requests for all others.

    A bucket is packed once for all engines of a kind, and the next one while they read it.
    """

    def __init__(self, fleet: Fleet, bucket_bytes: int):
        self.fleet, self.bucket_bytes = fleet, bucket_bytes
        self.rooms = {kind: Rooms(kind) for kind in (FileMemory, NamedMemory)}
        self.said = False

    def push(self, tensors: Iterable[Named], name: str) -> None:
        members = self.fleet.alive()
        self._say_who_is_elsewhere(members)
        self.fleet.each(members, lambda engine: engine.client.begin_weight_update())
        on_gpu = all(self._memory(engine) is DeviceMemory for engine in members)
        size = self.bucket_bytes if on_gpu else min(self.bucket_bytes, HOST_BUCKET_BYTES)
        with contextlib.ExitStack() as reading:
            for bucket in buckets(tensors, size):
                packed = _Packed(bucket, {engine: self._memory(engine) for engine in members})
                reading.close()  # of the bucket before, which ends here
                reading.callback(packed.send(self.fleet, name))
        if any(engine.state == "down" for engine in members):
            self.close()  # one that is late may still read
        self.fleet.each(members, lambda engine: engine.client.end_weight_update())
        self.fleet.confirm(members, name)

    def close(self) -> None:
        for rooms in self.rooms.values():
            rooms.close()

    def _memory(self, engine: Engine) -> Callable[[int], Memory] | None:
        """Where an engine reads tensors; None: in its requests."""
        if engine.reads == "requests":
            return None
        if engine.reads == "gpu" and torch.cuda.is_available():
            return DeviceMemory
        own = all(isinstance(e.process, EmbeddedServer) for e in self.fleet.engines)
        return self.rooms[FileMemory if own else NamedMemory]

    def _say_who_is_elsewhere(self, members: list[Engine]) -> None:
        elsewhere = [engine.url for engine in members if engine.reads == "requests"]
        if elsewhere and not self.said:
            say(
                f"rollout.server.sync=tensor: {elsewhere[0]} is not on this host, where it could "
                "read weights in place; they travel inside requests, and sync=distributed is faster"
            )
        self.said = True


class _Packed:
    """One bucket, in every kind of memory that an engine reads."""

    def __init__(
        self, named: list[Named], engines: Mapping[Engine, Callable[[int], Memory] | None]
    ):
        kinds = set(engines.values())
        self.buckets = {kind: Bucket(named, kind) for kind in kinds if kind is not None}
        inside = pack_tensors(named) if None in kinds else ""
        self.of = {engine: kind and self.buckets[kind] for engine, kind in engines.items()}
        self.parts = {
            engine: [bucket.payload() if bucket else inside for _ in range(engine.tp_size)]
            for engine, bucket in self.of.items()
        }

    def send(self, fleet: Fleet, name: str) -> Callable[[], None]:
        """Have the engines read it; the returned function waits until they have."""
        await_answers = fleet.begin_each(
            list(self.parts),
            lambda engine: engine.client.update_weights_from_tensor(
                self.parts[engine], name, load_format=FORMAT if self.of[engine] else None
            ),
        )

        def await_read() -> None:
            await_answers()
            for engine, bucket in self.of.items():
                if engine.state == "down" and bucket:
                    for part in self.parts[engine]:
                        bucket.forget(part)

        return await_read


class DistributedSync:
    """Broadcast from the trainer to all engines at once: NCCL between GPUs, gloo between CPUs.

    The group is made again whenever the set of engines changes.
    """

    def __init__(self, fleet: Fleet, bucket_bytes: int, timeout_s: float):
        self.fleet, self.bucket_bytes, self.timeout_s = fleet, bucket_bytes, timeout_s
        self.backend = "nccl" if torch.cuda.is_available() else "gloo"
        self.group: dist.ProcessGroup | None = None
        self.members: list[Engine] = []
        self.name = ""

    def push(self, tensors: Iterable[Named], name: str) -> None:
        self._join()
        members, group = self.members, self.name
        self.fleet.each(members, lambda engine: engine.client.begin_weight_update())
        for bucket in buckets(tensors, self.bucket_bytes):
            if self.group is None:
                continue  # the tensors are consumed all the same: other ranks are sending them
            described = [(key, tensor.dtype, tensor.shape) for key, tensor in bucket]
            await_received = self.fleet.begin_each(
                members,
                lambda engine, described=described: engine.client.update_weights_from_distributed(
                    described, name, group
                ),
            )
            try:
                for _, tensor in bucket:
                    dist.broadcast(tensor.contiguous(), src=0, group=self.group)
            except RuntimeError:  # gloo's and NCCL's: an engine is gone, or came too late
                self._leave()
            await_received()
            self._leave_if_broken()
        self.fleet.each(members, lambda engine: engine.client.end_weight_update())
        self.fleet.confirm(members if self.group is not None else [], name)

    def close(self) -> None:
        self._leave()

    def _join(self) -> None:
        """A group of the trainer and the engines that live; None if one did not come."""
        if self.group is not None and self.fleet.alive() == self.members:
            return
        self._leave()
        self.members = self.fleet.alive()
        ends = list(itertools.accumulate((e.tp_size for e in self.members), initial=1))
        first = dict(zip(self.members, ends, strict=False))
        self.name = name = f"weights-{next(_numbers)}"
        host = self.fleet.trainer_address
        store = dist.TCPStore(host, 0, None, True, wait_for_workers=False)  # any free port
        await_joined = self.fleet.begin_each(
            self.members,
            lambda engine: engine.client.init_weights_update_group(
                host, store.port, first[engine], ends[-1], name, self.backend
            ),
        )
        with contextlib.suppress(RuntimeError):
            self.group = join_group(store, name, 0, ends[-1], self.backend, self.timeout_s)
        await_joined()
        self._leave_if_broken()

    def _leave_if_broken(self) -> None:
        if any(engine.state == "down" for engine in self.members):
            self._leave()

    def _leave(self) -> None:
        if self.group is None:
            return
        leave_group(self.group)
        self.group, name = None, self.name
        self.fleet.each(
            self.members, lambda engine: engine.client.destroy_weights_update_group(name)
        )


def buckets(tensors: Iterable[Named], size: int) -> Iterator[list[Named]]:
    """Consecutive tensors of at most `size` bytes together; a larger one comes alone."""
    bucket: list[Named] = []
    filled = 0
    for name, tensor in tensors:
        if bucket and filled + tensor.nbytes > size:
            yield bucket
            bucket, filled = [], 0
        bucket.append((name, tensor))
        filled += tensor.nbytes
    if bucket:
        yield bucket
