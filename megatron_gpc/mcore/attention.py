"""Causal attention over packed sequences, for layers that have no kernel of transformer-engine's.

megatron-core packs sequences one after another in one long row (its "thd" format) and leaves it to
transformer-engine to keep them apart and to cut them over context-parallel ranks; its own attention
refuses both.  This module takes its place in the layer, on a CPU and in fp32, so that packing is
the only way there is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from torch.nn.functional import scaled_dot_product_attention

from megatron_gpc.batching import chunk_positions
from megatron_gpc.errors import UserError


@dataclass
class Pack(PackedSeqParams):
    """megatron-core's description of a pack, and what this module wants to know of it on the CPU:
    asking the GPU for it would stop the host once a layer."""

    lengths_B: tuple[int, ...] = ()
    """How long each sequence is."""
    routes: torch.Tensor | None = None
    """MicroBatch.routes (mcore/routing.py)."""


_ONLY = {
    "attention_dropout": 0.0,
    "apply_query_key_layer_scaling": False,
    "window_size": None,
    "softmax_type": "vanilla",
}


class PackedAttention(MegatronModule):
    """torch's scaled_dot_product_attention for every sequence of a pack.

    Neighbours of equal length are computed together, as views.  That is why batching.py orders the
    sequences of a micro-batch by length: many short ones then cost a few calls and no copy.

    A context-parallel rank holds two chunks of every sequence (batching.chunk_positions).  It
    gathers keys and values of all ranks, whose gradients are summed on the way back, and computes
    its own queries.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        pg_collection: ProcessGroupCollection,
        softmax_scale: float | None = None,
        **unused: Any,
    ):
        """Takes the arguments that megatron-core's attention layer passes.

        Raises:
            UserError: `megatron.transformer` asks for a kind of attention that this module lacks.
        """
        super().__init__(config=config)
        assert attn_mask_type is AttnMaskType.causal and attention_type == "self"
        for name, value in _ONLY.items():
            if getattr(config, name) != value:
                raise UserError(
                    f"megatron.transformer.{name}={getattr(config, name)} needs CUDA, "
                    f"transformer-engine and model.dtype=bfloat16; here it must be {value}"
                )
        self.softmax_scale = softmax_scale
        self.cp_group = pg_collection.cp

    def forward(
        self,
        query_SHD: torch.Tensor,
        key_SGD: torch.Tensor,
        value_SGD: torch.Tensor,
        attention_mask: None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: None = None,
        *,
        packed_seq_params: Pack,
    ) -> torch.Tensor:
        """[S, heads * head size], softmax in fp32.

        Args:
            query_SHD: [positions, heads, head size].
            key_SGD, value_SGD: [positions, key-value groups, head size].
            attention_mask, attn_mask_type, attention_bias: ignored; attention is always causal.
            packed_seq_params: how long the sequences are.
        """
        lengths = packed_seq_params.lengths_B
        ranks = self.cp_group.size()
        if ranks > 1:
            pairs = torch.stack((key_SGD, value_SGD), dim=1)
            key_SGD, value_SGD = self._of_all_ranks(pairs, lengths).unbind(1)
        runs = [(length, len(list(same))) for length, same in groupby(lengths)]
        sizes = [length * count for length, count in runs]
        queries = query_SHD.split([size // ranks for size in sizes])
        outputs = []
        for (length, count), *parts in zip(
            runs, queries, key_SGD.split(sizes), value_SGD.split(sizes), strict=True
        ):
            query, key, value = (x.view(count, -1, *x.shape[1:]).transpose(1, 2) for x in parts)
            seen = None if ranks == 1 else self._seen(length).to(query.device)
            output = attention(query, key, value, seen, self.softmax_scale)
            outputs.append(output.transpose(1, 2).flatten(2).flatten(0, 1))
        return torch.cat(outputs) if len(outputs) > 1 else outputs[0]

    def _of_all_ranks(self, mine: torch.Tensor, lengths: Sequence[int]) -> torch.Tensor:
        """Every position of the pack, in order.  A collective over the context-parallel group."""
        gathered = gather_from_sequence_parallel_region(mine, group=self.cp_group)
        ranks = self.cp_group.size()
        order = torch.cat([chunk_positions(lengths, rank, ranks) for rank in range(ranks)])
        return gathered[order.argsort().to(mine.device)]

    def _seen(self, length: int) -> torch.Tensor:
        """[positions of a sequence that this rank holds, its length]: which keys a query sees."""
        held = chunk_positions([length], self.cp_group.rank(), self.cp_group.size())
        return torch.arange(length) <= held[:, None]


def attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    seen: torch.Tensor | None,
    scale: float | None,
) -> torch.Tensor:
    """[sequences, heads, queries, head size], by a kernel that keeps no scores.

    On a GPU that is FlashAttention's, which takes 16 bits and no mask, or the memory-efficient one,
    for which heads of a group must each have their key and value.  What both refuse, torch computes
    with a matrix of scores for every head.

    Args:
        query: [sequences, heads, queries, head size].
        key, value: [sequences, groups, keys, head size].
        seen: [queries, keys], which keys a query sees; None: those up to its own.
        scale: of the scores; None: 1 / sqrt(head size).
    """
    grouped = key.shape[1] != query.shape[1]
    if grouped and query.is_cuda and (seen is not None or query.dtype is torch.float32):
        key, value = each_head(key, query.shape[1]), each_head(value, query.shape[1])
        grouped = False
    return scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=seen,
        is_causal=seen is None,
        scale=scale,
        enable_gqa=grouped,
    )


def each_head(of_groups: torch.Tensor, heads: int) -> torch.Tensor:
    """[sequences, groups, ...] -> [sequences, heads, ...]: every head its group's."""
    return of_groups.repeat_interleave(heads // of_groups.shape[1], dim=1)
