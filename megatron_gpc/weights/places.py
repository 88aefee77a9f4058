"""Where megatron-core's distributed checkpoint keeps a parameter.

A checkpoint has keys, each with one global tensor.  Where all layers are alike, megatron-core keeps
the same parameter of all layers under one key, stacked along a first dimension; otherwise every
layer has keys of its own.  Experts are always stacked.  (megatron/core/transformer,
TransformerBlock.sharded_state_dict and SequentialMLP.sharded_state_dict.)  Keys are those of the
transformer-engine layer spec, to which the local spec maps its own (mcore/model.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_gpc.weights.fields import ModelFields
from megatron_gpc.weights.table import Param


@dataclass(frozen=True)
class Place:
    """One parameter's part of a key's global tensor.

    Expert 3 of layer 1 in a model of 2 layers and 4 experts:

    >>> Place(param, key="decoder.layers.mlp.experts.experts.linear_fc2.weight",
    ...       index=(1, 3), counts=(2, 4))
    """

    param: Param
    key: str
    index: tuple[int, ...]
    """Layer and expert number, for the dimensions that are stacked."""
    counts: tuple[int, ...]
    """Lengths of those dimensions."""

    @property
    def global_shape(self) -> tuple[int, ...]:
        """Of the key's tensor, [*counts, *param.shape]."""
        return (*self.counts, *self.param.shape)

    def __str__(self) -> str:
        """For messages: the key, and which part of it."""
        return self.key + (str(list(self.index)) if self.index else "")


def places_of(params: Sequence[Param], fields: ModelFields) -> tuple[Place, ...]:
    """The place of every parameter, in their order."""
    layers = fields.transformer["num_layers"]
    stacked = fields.transformer.get("moe_layer_freq", 1) == 1
    found = []
    for param in params:
        key, index, counts = param.megatron, [], []
        if param.layer is not None and stacked:
            key = key.replace(f"layers.{param.layer}.", "layers.", 1)
            index.append(param.layer)
            counts.append(layers)
        if param.expert is not None:
            key = key.replace(f"local_experts.{param.expert}.", "experts.", 1)
            index.append(param.expert)
            counts.append(fields.transformer["num_moe_experts"])
        found.append(Place(param, key, tuple(index), tuple(counts)))
    return tuple(found)
