"""Keeps the policy's training state in CPU memory while engines generate on the same GPUs."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from megatron_gpc.mcore.policy import Policy
from megatron_gpc.mcore.setup import device


class Offload:
    """Optimizer state and fp32 weights out of the device's memory and back, to the bit.

    What moves is the storages, under tensors that stay: views of them, which megatron-core has many
    of, are whole again afterwards.  (Its own `offload_to_cpu` moves tensors, and parts an fp32
    policy's optimizer from the weights.)  Gradients are only dropped: every update starts from 0.
    Weights of the network stay, to be handed over and to score with.
    """

    def __init__(self, policy: Policy):
        self.policy = policy
        self.away: list[tuple[torch.UntypedStorage, torch.Tensor]] = []
        """Emptied storages, and what was in them."""
        self.is_away = False

    def to_host(self) -> None:
        """Does nothing the second time."""
        if self.is_away:
            return
        self.policy.optimizer.zero_grad()  # gradients may be copies beside the buffers
        for storage in self._storages():
            content = _bytes(storage)
            self.away.append((storage, host_copy(content)))
            del content
            storage.resize_(0)
        for chunk in self.policy.chunks:
            chunk.offload_grad_buffers(synchronize=False, empty_cache=False)
        if device().type == "cuda":
            torch.cuda.empty_cache()  # or this process would keep the memory
        self.is_away = True

    def to_device(self) -> None:
        """Does nothing if everything is there already."""
        if not self.is_away:
            return
        for storage, kept in self.away:
            storage.resize_(kept.nbytes)
            _bytes(storage).copy_(kept)
        self.away.clear()
        for chunk in self.policy.chunks:
            chunk.restore_grad_buffers(synchronize=False)
        self.is_away = False

    def _storages(self) -> Iterator[torch.UntypedStorage]:
        """What the optimizer holds on the device, once each, without the network's own weights."""
        seen = {p.untyped_storage()._cdata for m in self.policy.models for p in m.parameters()}
        for optimizer in self.policy.optimizer.chained_optimizers:
            held = [p for group in optimizer.optimizer.param_groups for p in group["params"]]
            for state in optimizer.optimizer.state.values():
                held += [value for value in state.values() if isinstance(value, torch.Tensor)]
            for tensor in held:
                storage = tensor.untyped_storage()
                if tensor.device.type == device().type and storage._cdata not in seen:
                    seen.add(storage._cdata)
                    yield storage


def host_copy(tensor: torch.Tensor) -> torch.Tensor:
    """In CPU memory, from where it is quickly back."""
    kept = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
    return kept.copy_(tensor)


def _bytes(storage: torch.UntypedStorage) -> torch.Tensor:
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
