"""Routing replay: tokens go to the experts that the rollout's routers sent them to.

megatron-core's router lets its choice be replaced (`router_replay`).  Its own replacement wants to
be told of every pass, and holds one micro-batch at a time; this one is told by the layer it stands
in, so that pipelines and recomputation, where passes of several micro-batches mix, need no further
thought.  What an expert's output is multiplied by is still the router's, with its gradient.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.transformer.moe.moe_layer import MoELayer

from megatron_gpc.types import Experts


class ReplayedChoice:
    """Stands in for one router's choice of experts.

    Args:
        column: which of the layers with experts it is.
        experts: of the model.
        layer: megatron-core's, whose router it is; gets hooks.
    """

    def __init__(self, column: int, experts: Experts, layer: Any):
        self.columns = slice(column * experts.topk, (column + 1) * experts.topk)
        self.sequence_parallel: bool = layer.config.sequence_parallel
        self.counts: torch.Tensor | None = None
        """[routes that the router would not have taken, routes], since the last `take_counts`."""
        self._wanted_SK: torch.Tensor | None = None
        self._passing = False
        """Whether the layer's forward pass is going on: the router is then called for it."""
        self._again: deque[torch.Tensor | None] = deque()
        """Of passes whose experts will be computed again, by themselves, for their gradient."""
        self._computed_again = layer.mlp.moe_layer_recompute or layer.recompute_mlp
        layer.mlp.router.router_replay = self
        layer.register_forward_pre_hook(self._begin, with_kwargs=True)
        layer.register_forward_hook(self._end)

    def _begin(self, layer: Any, unnamed: Any, named: dict[str, Any]) -> None:
        routes = named["packed_seq_params"].routes
        self._wanted_SK = None if routes is None else routes[:, self.columns]
        if self.sequence_parallel and self._wanted_SK is not None:
            ranks = parallel_state.get_tensor_model_parallel_world_size()
            rank = parallel_state.get_tensor_model_parallel_rank()
            self._wanted_SK = self._wanted_SK.chunk(ranks)[rank]
        self._passing = True
        if self._computed_again and torch.is_grad_enabled():
            self._again.append(self._wanted_SK)

    def _end(self, *unused: Any) -> None:
        self._passing, self._wanted_SK = False, None

    def forget(self) -> None:
        """Before other micro-batches: whatever was not computed again will not be."""
        self._again.clear()

    def get_replay_topk(
        self,
        scores_SE: torch.Tensor,
        topk: int,
        num_groups: int | None,
        group_topk: int | None,
        own_choice: Callable[..., tuple[torch.Tensor, torch.Tensor]],
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(scores, numbers) of the experts that every token goes to, [S, topk] each.

        The router asks.  A token of which the rollout says nothing goes where the router sends it.
        """
        values_SK, own_SK = own_choice(scores_SE, topk, num_groups, group_topk)
        wanted_SK = self._wanted_SK if self._passing else self._again.popleft()
        if wanted_SK is None:
            return values_SK, own_SK
        wanted_SK = wanted_SK.to(own_SK)
        known_SK = wanted_SK >= 0
        chosen_SK = torch.where(known_SK, wanted_SK, own_SK)
        if self._passing:
            other_SK = (chosen_SK[:, :, None] != own_SK[:, None, :]).all(-1)
            counts = torch.stack([other_SK.sum(), known_SK.sum()])
            self.counts = counts if self.counts is None else self.counts + counts
        return scores_SE.gather(1, chosen_SK), chosen_SK


class RoutingReplay:
    """All of a rank's routers.

    Args:
        models: the policy's, one a virtual pipeline stage.
        experts: of the model.
    """

    def __init__(self, models: Sequence[Any], experts: Experts):
        self.choices: list[ReplayedChoice] = []
        for model in models:
            for layer in model.decoder.layers:
                if isinstance(layer.mlp, MoELayer):
                    column = experts.layers.index(layer.layer_number - 1)
                    self.choices.append(ReplayedChoice(column, experts, layer))

    def forget(self) -> None:
        """Begin anew: with other micro-batches, and counting from 0."""
        for choice in self.choices:
            choice.forget()
            choice.counts = None

    def counts(self) -> tuple[int, int]:
        """(routes that this rank's routers would not have taken, all routes) since `forget`."""
        known = [choice.counts for choice in self.choices if choice.counts is not None]
        other, every = torch.stack(known).sum(0).tolist() if known else (0, 0)
        return other, every
