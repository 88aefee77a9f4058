"""Causal attention over packed sequences, for layers that have no kernel of transformer-engine's.

megatron-core packs sequences one after another in one long row (its "thd" format) and leaves it to
transformer-engine to keep them apart; its own attention refuses them.  This module takes its place
in the layer, on a CPU and in fp32, so that packing is the only way there is.
"""

from __future__ import annotations

from itertools import groupby
from typing import Any

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from torch.nn.functional import scaled_dot_product_attention

from megatron_gpc.errors import UserError

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
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        softmax_scale: float | None = None,
        **unused: Any,
    ):
        """The arguments are those that megatron-core's attention layer gives.

        Raises:
            UserError: `megatron.transformer` asks for an attention that this is not.
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

    def forward(
        self,
        query_SHD: torch.Tensor,
        key_SGD: torch.Tensor,
        value_SGD: torch.Tensor,
        attention_mask: None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: None = None,
        *,
        packed_seq_params: PackedSeqParams,
    ) -> torch.Tensor:
        """[S, heads * head size], softmax in fp32.

        Args:
            query_SHD: [positions, heads, head size].
            key_SGD, value_SGD: [positions, key-value groups, head size].
            attention_mask, attn_mask_type, attention_bias: nothing but causal attention is there.
            packed_seq_params: where the sequences begin.
        """
        lengths = packed_seq_params.cu_seqlens_q.diff().tolist()
        runs = [(length, len(list(same))) for length, same in groupby(lengths)]
        sizes = [length * count for length, count in runs]
        outputs = []
        for (length, count), *parts in zip(
            runs, *(x.split(sizes) for x in (query_SHD, key_SGD, value_SGD)), strict=True
        ):
            query, key, value = (x.view(count, length, *x.shape[1:]).transpose(1, 2) for x in parts)
            output = scaled_dot_product_attention(
                query, key, value, is_causal=True, scale=self.softmax_scale, enable_gqa=True
            )
            outputs.append(output.transpose(1, 2).reshape(count * length, -1))
        return torch.cat(outputs)
