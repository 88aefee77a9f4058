"""The embedded server's end of process groups in which weights are broadcast."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta

import torch
import torch.distributed as dist

from megatron_gpc.engines.weight_group import join_group, leave_group
from megatron_gpc.errors import UserError

TIMEOUT_S = 300.0
"""Deadline of joining and of one broadcast [s], so that no dead trainer blocks the server."""


class WeightReceiver:
    """Groups by name.  Methods block; call them from a thread."""

    def __init__(self) -> None:
        self._groups: dict[str, dist.ProcessGroup] = {}

    def join(
        self, address: str, port: int, rank: int, world_size: int, name: str, backend: str
    ) -> None:
        """Meet the others at the trainer's store.

        Raises:
            UserError: the name is taken, the backend is not for CPUs, or not all came.
        """
        if name in self._groups:
            raise UserError(f"there is a group {name!r} already")
        if backend != "gloo":
            raise UserError(f"backend {backend!r}: the embedded server is on a CPU; use gloo")
        try:
            store = dist.TCPStore(address, port, None, False, timeout=timedelta(seconds=TIMEOUT_S))
            self._groups[name] = join_group(store, name, rank, world_size, backend, TIMEOUT_S)
        except (RuntimeError, ValueError) as error:  # dist's errors are RuntimeErrors
            raise UserError(f"Failed to initialize custom process group: {error}.") from None

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
        if not all(isinstance(kind, torch.dtype) for kind in kinds):
            raise UserError(f"dtypes: not all of {sorted(set(dtypes))} are torch's")
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
