"""Which experts a mixture's routers choose in the forward passes of the embedded generator."""

from __future__ import annotations

import re
from typing import Any

import torch
from transformers import PreTrainedModel


class RouteTap:
    """Listens to the routers of a model.

    Args:
        model: one without routers has no routes.
    """

    def __init__(self, model: PreTrainedModel):
        self.layers: int = model.config.num_hidden_layers
        self._chosen: dict[int, torch.Tensor] = {}
        self._topk = 0
        modules: Any = model.named_modules()
        for name, module in modules:
            if type(module).__name__.endswith("TopKRouter"):
                (layer,) = re.findall(r"layers\.(\d+)\.", name)
                self._topk = module.top_k
                module.register_forward_hook(self._heard(int(layer)))

    def __bool__(self) -> bool:
        """Whether the model has routers."""
        return self._topk > 0

    def _heard(self, layer: int) -> Any:
        def hook(module: torch.nn.Module, given: Any, found: Any) -> None:
            self._chosen[layer] = found[2]  # after logits and scores

        return hook

    def last(self, rows: int) -> torch.Tensor:
        """[rows, columns, layers, experts a token] int32 of the last forward pass, as SGLang has
        them: a layer without experts has zeros.

        Args:
            rows: of its input.
        """
        some = next(iter(self._chosen.values()))
        found = torch.zeros(rows, len(some) // rows, self.layers, self._topk, dtype=torch.int32)
        for layer, chosen in self._chosen.items():
            found[:, :, layer] = chosen.view(rows, -1, self._topk)
        return found
