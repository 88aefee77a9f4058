"""Weights in and out of the sharded policy, by the tables of `weights/`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from megatron_gpc.mcore.model import PolicyModel
from megatron_gpc.weights import HFReader, Param, shard, to_hf, to_megatron, unshard

BUCKET_BYTES = 256 * 2**20
"""Most that is gathered at once when weights are handed over."""


def named_shards(models: Sequence[PolicyModel]) -> dict[str, tuple[torch.nn.Parameter, int, int]]:
    """This rank's parameters by global canonical name, with (which part it is, how many there are).

    Layers and experts are numbered within a process and the local layer spec keeps norms beside the
    matrices they feed; the tables know one name for each parameter, whatever the layout and spec.
    """
    found = {}
    for model in models:
        own = dict(model.named_parameters())
        for local, parameter in own.items():
            cut = bool(getattr(parameter, "tensor_model_parallel", False))
            if "local_experts" in local:
                size = parallel_state.get_expert_tensor_parallel_world_size()
                rank = parallel_state.get_expert_tensor_parallel_rank()
            else:
                size = parallel_state.get_tensor_model_parallel_world_size()
                rank = parallel_state.get_tensor_model_parallel_rank()
            name = _canonical(model, local, own)
            if name not in found:  # tied embeddings: the first stage's copy stands for both
                found[name] = (parameter, rank if cut else 0, size if cut else 1)
    return found


def _canonical(model: PolicyModel, local: str, own: dict[str, torch.nn.Parameter]) -> str:
    parts = local.split(".")
    if parts[:2] == ["decoder", "layers"]:
        here = ".".join(parts[:3])
        dense = f"{here}.mlp.router.weight" not in own
        layer: Any = model.decoder.layers[int(parts[2])]
        parts[2] = str(layer.layer_number - 1)
        if parts[3] == "input_layernorm":
            parts[3:] = ["self_attention", "linear_qkv", "layer_norm_weight"]
        elif parts[3] == "pre_mlp_layernorm" and dense:
            parts[3:] = ["mlp", "linear_fc1", "layer_norm_weight"]
        elif "local_experts" in parts:
            at = parts.index("local_experts") + 1
            core: Any = model.config
            experts_here = core.num_moe_experts // core.expert_model_parallel_size
            first = parallel_state.get_expert_model_parallel_rank() * experts_here
            parts[at] = str(int(parts[at]) + first)
    elif local == "output_layer.weight" and model.share_embeddings_and_output_weights:
        return "embedding.word_embeddings.weight"
    return ".".join(parts)


def load_hf(
    models: Sequence[PolicyModel],
    params: Sequence[Param],
    folder: Path,
    copies: Mapping[str, str],
) -> None:
    """Fill the policy from a Hugging Face checkpoint; every rank reads what it holds.

    Args:
        copies: tensors that the checkpoint may hold twice, from `Family.copies`.

    Raises:
        UserError: a tensor is missing, surplus or misshapen.
    """
    table = {param.megatron: param for param in params}
    reader = HFReader(folder)
    reader.check(params, copies)
    with torch.no_grad():
        for model in models:
            for name, (parameter, part, parts) in named_shards([model]).items():
                param = table[name]
                whole = to_megatron(param, [reader.get(hf_name) for hf_name in param.hf])
                parameter.copy_(shard(param, whole, part, parts))


class Exporter:
    """Collects the policy's weights on rank 0 as Hugging Face tensors, a bucket at a time.

    Works point to point from whoever holds a part, so it is the same at every layout (TP, PP, EP),
    and extra memory is a bucket on each side, not a model.
    """

    def __init__(
        self,
        models: Sequence[PolicyModel],
        params: Sequence[Param],
        bucket_bytes: int = BUCKET_BYTES,
    ):
        """A collective: every rank enters it."""
        self.shards = named_shards(models)
        mine = {name: (part, parts) for name, (_, part, parts) in self.shards.items()}
        everyone: list[dict[str, tuple[int, int]]] = [{} for _ in range(dist.get_world_size())]
        dist.all_gather_object(everyone, mine)
        some = next(iter(self.shards.values()))[0]
        self.dtype, self.device = some.dtype, some.device
        self.buckets: list[tuple[tuple[int, ...], list[Param]]] = []
        self.shard_shapes: dict[str, torch.Size] = {}
        filled = 0
        for param in params:
            holders = _holders(param, everyone)
            shape = list(param.shape)
            if param.split_dim is not None:
                shape[param.split_dim] //= len(holders)
            self.shard_shapes[param.megatron] = torch.Size(shape)
            size = torch.Size(param.shape).numel() * self.dtype.itemsize
            if not self.buckets or self.buckets[-1][0] != holders or filled + size > bucket_bytes:
                self.buckets.append((holders, []))
                filled = 0
            self.buckets[-1][1].append(param)
            filled += size

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """(Hugging Face name, tensor) on rank 0, nothing elsewhere; every rank exhausts it."""
        rank = dist.get_rank()
        for holders, params in self.buckets:
            if rank in holders and rank != 0:
                dist.send(self._flat(params), dst=0)
            if rank != 0:
                continue
            shapes = [self.shard_shapes[param.megatron] for param in params]
            sizes = [shape.numel() for shape in shapes]
            parts = [
                self._flat(params) if holder == 0 else self._received(sum(sizes), holder)
                for holder in holders
            ]
            split = [part.split(sizes) for part in parts]
            for i, (param, shape) in enumerate(zip(params, shapes, strict=True)):
                whole = unshard(param, [flat[i].view(shape) for flat in split])
                yield from zip(param.hf, to_hf(param, whole), strict=True)

    def _flat(self, params: Sequence[Param]) -> torch.Tensor:
        return torch.cat([self.shards[p.megatron][0].detach().flatten() for p in params])

    def _received(self, numel: int, holder: int) -> torch.Tensor:
        part = torch.empty(numel, dtype=self.dtype, device=self.device)
        dist.recv(part, src=holder)
        return part


def _holders(param: Param, everyone: Sequence[dict[str, tuple[int, int]]]) -> tuple[int, ...]:
    """First rank that holds each part of a parameter, in the order of the parts."""
    first: dict[int, int] = {}
    parts = 1
    for rank, held in enumerate(everyone):
        if param.megatron in held:
            part, parts = held[param.megatron]
            first.setdefault(part, rank)
    assert len(first) == parts, f"{param.megatron}: {len(first)} of {parts} parts are held"
    return tuple(first[part] for part in range(parts))
