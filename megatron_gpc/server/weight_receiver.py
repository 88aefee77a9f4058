"""The embedded server's end of process groups in which weights are broadcast."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist

from megatron_gpc.engines.weight_group import join_group, leave_group
from megatron_gpc.errors import UserError

TIMEOUT_S = 300.0
"""Deadline of joining and of one broadcast [s], so that no dead trainer blocks the server."""


CONNECT_TIMEOUT_S = 20.0
"""Deadline of reaching the trainer's store, which is there before it asks engines to join [s]."""
MOST_GROUPS = 8


class WeightReceiver:
    """Groups by name.  Methods block; call them from one of `threads`.

    Args:
        most_elements: of the tensors of one broadcast together.
    """

    def __init__(self, most_elements: int) -> None:
        self.threads = ThreadPoolExecutor(2 * MOST_GROUPS, "groups")
        self._most_elements = most_elements
        self._groups: dict[str, dist.ProcessGroup] = {}
        self._joining: set[str] = set()
        self._lock = threading.Lock()

    @contextmanager
    def _place(self, name: str) -> Iterator[None]:
        """Raises UserError if the name is taken, or too many groups are."""
        with self._lock:
            taken = self._joining | set(self._groups)
            if name in taken:
                raise UserError(f"there is a group {name!r} already")
            if len(taken) >= MOST_GROUPS:
                raise UserError(f"there are {MOST_GROUPS} groups already; leave one first")
            self._joining.add(name)
        try:
            yield
        finally:
            self._joining.discard(name)

    def join(
        self, address: str, port: int, rank: int, world_size: int, name: str, backend: str
    ) -> None:
        """Meet the others at the trainer's store.

        Raises:
            UserError: the name is taken, the backend is not for CPUs, or not all came.
        """
        if not rank < world_size:
            raise UserError(f"rank_offset: {rank} is not below world_size={world_size}")
        if backend != "gloo":
            raise UserError(f"backend {backend!r}: the embedded server is on a CPU; use gloo")
        with self._place(name):
            try:
                soon = timedelta(seconds=CONNECT_TIMEOUT_S)
                store = dist.TCPStore(address, port, None, False, timeout=soon)
                store.set_timeout(timedelta(seconds=TIMEOUT_S))
                self._groups[name] = join_group(store, name, rank, world_size, backend, TIMEOUT_S)
            except (RuntimeError, ValueError, TypeError) as error:  # dist's are RuntimeErrors
                reason = str(error).splitlines()[0][:300]
                raise UserError(f"Failed to initialize custom process group: {reason}.") from None

    def receive(
        self,
        name: str,
        names: Sequence[str],
        dtypes: Sequence[str],
        shapes: Sequence[Sequence[int]],
    ) -> list[tuple[str, torch.Tensor]]:
        """Tensors that rank 0 of a group broadcasts, in this order.

        Raises:
            UserError: no such group, an unknown dtype, lists of different lengths, a lost trainer.
        """
        if name not in self._groups:
            raise UserError(f"there is no group {name!r}; call init_weights_update_group first")
        if not len(names) == len(dtypes) == len(shapes):
            raise UserError("names, dtypes and shapes must be as many")
        kinds = [getattr(torch, dtype, None) for dtype in dtypes]
        known = [kind for kind in kinds if isinstance(kind, torch.dtype)]
        if len(known) < len(kinds):
            raise UserError("dtypes: not all of them are torch's")
        if not all(kind.is_floating_point for kind in known):
            raise UserError("dtypes: weights are floating-point numbers")
        if len(set(names)) < len(names):
            raise UserError("names: a name comes twice")
        if sum(map(math.prod, shapes)) > self._most_elements:
            raise UserError("shapes: the model has no such tensors, it is far smaller")
        received = [
            (tensor_name, torch.empty(tuple(shape), dtype=kind))
            for tensor_name, kind, shape in zip(names, kinds, shapes, strict=True)
        ]
        try:
            for _, tensor in received:
                dist.broadcast(tensor, src=0, group=self._groups[name])
        except RuntimeError as error:
            raise UserError(f"group {name!r}: the trainer is lost: {error}") from None
        return received

    def leave(self, name: str) -> None:
        """Raises UserError if there is no such group."""
        if name not in self._groups:
            raise UserError("The group to be destroyed does not exist.")
        leave_group(self._groups.pop(name))
