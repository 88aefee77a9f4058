"""A layer's experts in two matrix products, however many a rank has."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from megatron.core.transformer.mlp import MLP
from megatron.core.transformer.moe.experts import SequentialMLP
from torch.nn.functional import grouped_mm


class GroupedExperts(SequentialMLP):
    """megatron-core's experts, which it computes one after another, all at once.

    Parameters and their names stay, and with them tables, checkpoints and hand-overs.
    megatron-core's own grouped experts need transformer-engine, and store theirs under other names.
    """

    def forward(
        self,
        permuted_local_hidden_states: torch.Tensor,
        tokens_per_expert: torch.Tensor,
        permuted_probs: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """(what the experts give, times the router's probabilities; no bias).

        Args:
            permuted_local_hidden_states: [S, D], the first expert's, then the second's, and so on.
            tokens_per_expert: how many of them each gets.
            permuted_probs: [S], the router's.
        """
        hidden_SD = permuted_local_hidden_states
        if self.num_local_experts == 1 or not len(hidden_SD):
            return super().forward(hidden_SD, tokens_per_expert, permuted_probs)
        ends_E = tokens_per_expert.cumsum(0).to(hidden_SD.device, torch.int32)

        def linear(name: str) -> Any:
            weights = [getattr(expert, name).weight for expert in self.local_experts]
            return lambda rows: (GroupedProduct.apply(rows, ends_E, *weights), None)

        first: Any = self.local_experts[0]
        experts: Any = SimpleNamespace(
            config=first.config,
            activation_func=first.activation_func,
            linear_fc1=linear("linear_fc1"),
            linear_fc2=linear("linear_fc2"),
        )
        return MLP.forward(experts, hidden_SD, permuted_probs)


class GroupedProduct(torch.autograd.Function):
    """Rows times one of several matrices each.

    The matrices are put beside each other for a product and then let go: kept until the backward
    pass, every layer's would be there a second time.
    """

    @staticmethod
    def forward(
        ctx: Any, rows_SD: torch.Tensor, ends_E: torch.Tensor, *weights: torch.Tensor
    ) -> torch.Tensor:
        """[S, out].

        Args:
            rows_SD: those of the first matrix, then the second's, and so on.
            ends_E: one past the last row of each, int32.
            weights: E of [out, D].
        """
        ctx.save_for_backward(rows_SD, ends_E, *weights)
        return grouped_mm(rows_SD, torch.stack(weights).transpose(1, 2), offs=ends_E)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        rows_SD, ends_E, *weights = ctx.saved_tensors
        gradient_SO = gradients[0].contiguous()
        of_rows = grouped_mm(gradient_SO, torch.stack(weights), offs=ends_E)
        of_weights = grouped_mm(gradient_SO.t(), rows_SD, offs=ends_E)
        return of_rows, None, *of_weights
