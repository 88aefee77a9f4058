"""The policy's logits over whole sequences, for comparing and not for training."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region

from megatron_gpc.batching import join, multiples
from megatron_gpc.config import Config
from megatron_gpc.mcore.model import PolicyModel
from megatron_gpc.mcore.setup import device


@torch.no_grad()
def sequence_logits(
    config: Config, models: Sequence[PolicyModel], sequences: Sequence[Sequence[int]]
) -> list[torch.Tensor] | None:
    """Logits [S, V] of every position of every sequence, the vocabulary's padding cut off.

    The model is run as training runs it, and what its output layer gives is looked at.  A
    collective: every rank enters it.

    Returns:
        fp32 on the CPU, on one rank of those that hold the last pipeline stage; None on the others.
    """
    p, to = config.parallel, device()
    assert p.cp == 1  # no tool offers it
    sizes_B = torch.tensor([len(sequence) for sequence in sequences])
    tokens = torch.tensor([token for sequence in sequences for token in sequence])
    tokens_S, padded_B = join(tokens, sizes_B, multiples(p))
    lengths_B, rows_T = tuple(padded_B.tolist()), torch.arange(len(tokens))
    targets_T = torch.zeros_like(rows_T)

    logits_TV: list[torch.Tensor] = []
    last, hook = models[-1].eval(), None
    head, last.head = last.head, "logits"
    if last.post_process:
        hook = last.output_layer.register_forward_hook(
            lambda layer, given, result: logits_TV.append(
                gather_from_tensor_model_parallel_region(result[0])[:, 0, : last.true_vocab_size]
            )
        )

    def forward(iterator: Iterator[None], model: PolicyModel) -> tuple[Any, Any]:
        return (
            model(tokens_S.to(to), lengths_B, rows_T.to(to), targets_T.to(to)),
            lambda output, non_loss_data: None,
        )

    get_forward_backward_func()(
        forward_step_func=forward,
        data_iterator=[iter(()) for _ in models] if p.vpp else iter(()),
        model=list(models) if p.vpp else models[0],
        num_microbatches=p.pp if p.vpp else 1,  # the interleaved schedule needs a multiple of this
        seq_length=len(tokens_S),
        micro_batch_size=1,
        forward_only=True,
        collect_non_loss_data=True,
    )
    last.head = head
    if hook is not None:
        hook.remove()
    if not (
        last.post_process
        and parallel_state.get_tensor_model_parallel_rank() == 0
        and parallel_state.get_data_parallel_rank() == 0
    ):
        return None
    return [part.float().cpu() for part in logits_TV[0].split([len(s) for s in sequences])]
