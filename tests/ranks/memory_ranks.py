"""What a rank of a pool does in the test of the doctor's estimate."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from ranks import groups
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Live(TorchDispatchMode):
    """Bytes of the tensors that are made while it is entered, as long as they live."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = self.peak = 0
        self._known: dict[int, int] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        made = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in self._known:
                    self._known[storage._cdata] = storage.nbytes()
                    self.bytes += storage.nbytes()
                    weakref.finalize(storage, self._gone, storage._cdata)
        self.peak = max(self.peak, self.bytes)
        return made

    def _gone(self, storage: int) -> None:
        self.bytes -= self._known.pop(storage)


def peak_of_training(config: Any, hf: dict[str, Any]) -> int:
    """Bytes at the peak of an update's gradient, with the optimizer's state of later updates."""
    from megatron_gpc.batching import pack, token_streams
    from megatron_gpc.mcore.policy import Policy
    from megatron_gpc.types import Bounds, Prompt, Sample
    from megatron_gpc.weights import family_of

    samples = []
    for index in range(config.train.micro_batch_size):
        length = config.rollout.max_response_tokens
        drawn = torch.randint(hf["vocab_size"], (2 * length,)).tolist()
        prompt = Prompt(index, "", tuple(drawn[:length]), None)
        spans, made = (("0", 0, length),), tuple(drawn[length:])
        samples.append(Sample(prompt, 0, made, (-9.0,) * length, "", "stop", spans))
    batch = pack(samples, torch.tensor([1.0, -1.0] * (len(samples) // 2)))
    streams = token_streams(batch, batch.rollout_logp_T, torch.ones_like(batch.rollout_logp_T))
    live = Live()
    with groups(config), live:
        policy = Policy(config, family_of(hf).model_fields(hf))
        policy.weights_changed()
        policy.gradient(batch, [*range(len(samples))], streams, Bounds(0.0, 1.2, 0.0, 0.8))
    moments = 2 * 4 * sum(p.numel() for m in policy.models for p in m.parameters())
    return live.peak + moments
