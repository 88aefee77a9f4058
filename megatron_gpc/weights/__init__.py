"""Hugging Face tensors <-> Megatron parameters: one immutable table per model family.

Reading order: table (one parameter), families (the tables), fields (config.json), hf_files and
hf_writer (Hugging Face's files), handles (memory that engines read), places and megatron_files
(megatron-core's), convert (from one to the other).  The last two are imported by their own names:
torch's checkpointing, which they need, takes a second.
"""

from megatron_gpc.weights.check import check_reference, check_weights, replayed_experts
from megatron_gpc.weights.families import FAMILIES, Family, family_of
from megatron_gpc.weights.fields import ModelFields
from megatron_gpc.weights.folders import carry_over
from megatron_gpc.weights.hf_files import HFReader
from megatron_gpc.weights.hf_writer import SINGLE_HEADER_BYTES, write_hf, write_single
from megatron_gpc.weights.places import Place, places_of
from megatron_gpc.weights.table import (
    Param,
    padded_vocab_size,
    shard,
    to_hf,
    to_megatron,
    unshard,
)
