"""Hugging Face tensors <-> Megatron parameters: one immutable table per model family.

Reading order: table (one parameter), families (the tables), fields (config.json), hf_files (files).
"""

from megatron_gpc.weights.families import FAMILIES, Family, family_of
from megatron_gpc.weights.fields import ModelFields
from megatron_gpc.weights.hf_files import HFReader, carry_over, write_hf, write_single
from megatron_gpc.weights.table import (
    Param,
    padded_vocab_size,
    shard,
    to_hf,
    to_megatron,
    unshard,
)

__all__ = [
    "FAMILIES", "Family", "HFReader", "ModelFields", "Param", "carry_over", "family_of",
    "padded_vocab_size", "shard", "to_hf", "to_megatron", "unshard", "write_hf", "write_single",
]
