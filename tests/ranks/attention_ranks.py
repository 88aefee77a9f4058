"""What the ranks of a pool do in the tests of packed attention."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist


def packed_attention(
    parts: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    lengths: tuple[int, ...],
    weights_SE: torch.Tensor,
    softmax_scale: float | None,
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """(output, gradients of a weighted sum of it) of PackedAttention."""
    from itertools import accumulate

    from megatron_gpc.mcore.attention import Pack

    parts = tuple(part.clone().requires_grad_() for part in parts)
    begins = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)
    attention = _attention(softmax_scale=softmax_scale)
    pack = Pack("thd", begins, begins, lengths_B=lengths)
    output_SE = attention(*parts, None, packed_seq_params=pack)
    (output_SE * weights_SE).sum().backward()
    return output_SE.detach(), [part.grad for part in parts]


def grouped_and_not(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, seen: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention with keys and values of groups, and with a copy of them for every head."""
    from megatron_gpc.mcore.attention import attention, each_head

    heads = query.shape[1]
    copies = (each_head(part, heads) for part in (key, value))
    return attention(query, key, value, seen, None), attention(query, *copies, seen, None)


def refusal(name: str, value: Any) -> str:
    """What PackedAttention says to a setting of TransformerConfig."""
    from megatron_gpc.errors import UserError

    try:
        _attention({name: value})
    except UserError as error:
        return str(error)
    return ""


def _attention(settings: dict[str, Any] | None = None, **arguments: Any) -> Any:
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.transformer import TransformerConfig
    from megatron.core.transformer.enums import AttnMaskType

    from megatron_gpc.mcore.attention import PackedAttention

    config = TransformerConfig(
        num_layers=1,
        hidden_size=32,
        num_attention_heads=4,
        **{"attention_dropout": 0.0, **(settings or {})},
    )
    groups = ProcessGroupCollection(cp=dist.group.WORLD)
    return PackedAttention(config, 1, AttnMaskType.causal, "self", groups, **arguments)
