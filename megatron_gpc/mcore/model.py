"""The policy's network: megatron-core's GPTModel, ending in log-probs and entropies."""

from __future__ import annotations

from itertools import accumulate
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules

from megatron_gpc.batching import chunk_positions, ranges
from megatron_gpc.config import Config
from megatron_gpc.kernels import keeps_logits
from megatron_gpc.kernels.head import head_stats
from megatron_gpc.kernels.vocab_parallel import token_stats
from megatron_gpc.mcore.attention import Pack, PackedAttention
from megatron_gpc.mcore.experts import GroupedExperts
from megatron_gpc.mcore.native import transformer_config, uses_transformer_engine
from megatron_gpc.mcore.setup import device
from megatron_gpc.types import TokenStats
from megatron_gpc.weights import ModelFields, padded_vocab_size


class PolicyModel(GPTModel):
    """A GPTModel whose last stage returns TokenStats of the response tokens alone.

    The rows that predict response tokens are taken before the LM head, so that logits of prompts
    and padding never exist.  Log-prob and entropy are computed inside the model, so that neither
    Float16Module nor the pipeline ever copies logits.

    Args:
        head: `train.head`.
        chunk_tokens: `train.logit_chunk_tokens`.
    """

    def __init__(
        self,
        config: TransformerConfig,
        *args: Any,
        true_vocab_size: int,
        temperature: float,
        head: str,
        chunk_tokens: int,
        entropy_grad: bool,
        **kwargs: Any,
    ):
        super().__init__(config, *args, **kwargs)
        self.true_vocab_size = true_vocab_size
        self.temperature = temperature
        self.head = head
        self.chunk_tokens = chunk_tokens
        self.entropy_grad = entropy_grad
        if self.post_process and self.output_layer.sequence_parallel:
            # Rows are chosen from the whole sequence, so it is gathered here and not in the layer,
            # which from now on sums its input's gradient as it does without sequence parallelism.
            self.output_layer.sequence_parallel = False
            self.output_layer.allreduce_dgrad = True

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride] - what a stage is given
        self,
        tokens_S: torch.Tensor,
        lengths_B: tuple[int, ...],
        rows_T: torch.Tensor,
        targets_T: torch.Tensor,
        routes: torch.Tensor | None = None,
    ) -> torch.Tensor | TokenStats:
        """Hidden states [S, 1, D] before the last pipeline stage, TokenStats on it.

        Args:
            tokens_S: sequences, one after another; each has its own positions and attention.
            lengths_B: how long each is.
            rows_T: positions that predict targets_T.
            targets_T: the tokens predicted there.
            routes: which experts they are sent to; None: as the routers choose.
        """
        self._rows_T, self._targets_T = rows_T, targets_T
        begins: Any = None
        if uses_transformer_engine(self.config.params_dtype):
            ends = list(accumulate(lengths_B, initial=0))
            begins = torch.tensor(ends, dtype=torch.int32, device=tokens_S.device)
        packed = Pack(
            qkv_format="thd",
            cu_seqlens_q=begins,
            cu_seqlens_kv=begins,
            max_seqlen_q=max(lengths_B),
            max_seqlen_kv=max(lengths_B),
            lengths_B=lengths_B,
            routes=routes,
        )
        # Rotary embeddings need the lengths alone, so no positions are given, and attention is
        # causal inside each sequence without a mask.
        nothing: Any = (None, None)
        return super().forward(tokens_S[None], *nothing, packed_seq_params=packed)

    def _preprocess(self, *args: Any, packed_seq_params: Pack, **given: Any) -> tuple[Any, ...]:
        """megatron-core's inputs of the layers.

        Its own layers cut a pack into sequences to rotate queries and keys, in every layer again;
        without `cu_seqlens_q` they take the angles of every position of the pack as they are.
        """
        made = super()._preprocess(*args, packed_seq_params=packed_seq_params, **given)
        if packed_seq_params.cu_seqlens_q is not None:
            return made
        hidden, angles_L11D, *others = made
        lengths_B, cp = torch.tensor(packed_seq_params.lengths_B), self.pg_collection.cp
        places_S = ranges(torch.zeros_like(lengths_B), lengths_B)
        if cp.size() > 1:
            places_S = places_S[chunk_positions(packed_seq_params.lengths_B, cp.rank(), cp.size())]
        return hidden, angles_L11D[places_S.to(angles_L11D.device), 0], *others

    def _postprocess(  # pyright: ignore[reportIncompatibleMethodOverride] - the rest is unused
        self, hidden_states: torch.Tensor, **unused: Any
    ) -> torch.Tensor | TokenStats:
        if not self.post_process:
            return hidden_states
        if self.config.sequence_parallel:
            hidden_states = gather_from_sequence_parallel_region(
                hidden_states, tensor_parallel_output_grad=False, group=self.pg_collection.tp
            )
        hidden_T1D = hidden_states[self._rows_T]
        weight = None
        if self.share_embeddings_and_output_weights:
            weight = self.shared_embedding_or_output_weight()
        asked: Any = {
            "vocab_size": self.true_vocab_size,
            "group": self.pg_collection.tp,
            "temperature": self.temperature,
            "entropy_grad": self.entropy_grad,
        }
        if self.head == "logits":
            logits_T1V, _ = self.output_layer(hidden_T1D, weight=weight)
            logits_TV = logits_T1V[:, 0]
            return token_stats(logits_TV, self._targets_T, chunk_tokens=self.chunk_tokens, **asked)
        weight_VD: Any = self.output_layer.weight if weight is None else weight
        logits_bytes = len(hidden_T1D) * len(weight_VD) * weight_VD.element_size()
        keep = self.head == "auto" and keeps_logits(logits_bytes)
        return head_stats(hidden_T1D[:, 0], weight_VD, self._targets_T, keep_logits=keep, **asked)


def build_model(config: Config, fields: ModelFields) -> list[PolicyModel]:
    """This rank's part of the policy, one module a virtual pipeline stage; weights not yet set."""
    core = transformer_config(config, fields)
    chosen = config.train.experts
    grouped = chosen == "grouped" or (chosen == "auto" and torch.cuda.is_available())
    chunks = []
    for stage in range(config.parallel.vpp or 1):
        vp_stage = stage if config.parallel.vpp else None
        chunk = PolicyModel(
            core,
            _layers(core, vp_stage, grouped),
            padded_vocab_size(fields.vocab_size, config.parallel.tp),
            fields.max_position_embeddings,
            pre_process=parallel_state.is_pipeline_first_stage(
                ignore_virtual=False, vp_stage=vp_stage
            ),
            post_process=parallel_state.is_pipeline_last_stage(
                ignore_virtual=False, vp_stage=vp_stage
            ),
            vp_stage=vp_stage,
            true_vocab_size=fields.vocab_size,
            temperature=config.rollout.temperature,
            head=config.train.head,
            chunk_tokens=config.train.logit_chunk_tokens,
            entropy_grad=config.train.entropy_coef != 0.0,
            **fields.gpt,
        )
        chunks.append(chunk.to(device()))  # torch's norms and a gate of experts are made elsewhere
    return chunks


def _layers(
    core: TransformerConfig, vp_stage: int | None, grouped: bool
) -> TransformerBlockSubmodules:
    """This stage's layers.

    Checkpoints have transformer-engine's names, to which the local spec maps its own.  It does so
    for the norm before a dense block also if experts follow, and there transformer-engine keeps
    the norm apart: without that entry both write the same names.

    Args:
        grouped: whether experts are GroupedExperts.
    """
    with_te = uses_transformer_engine(core.params_dtype)
    block = get_gpt_decoder_block_spec(
        core, use_transformer_engine=with_te, normalization="RMSNorm", vp_stage=vp_stage
    )
    layers: Any = block.layer_specs
    for layer in layers:
        if not with_te:
            layer.submodules.self_attention.submodules.core_attention = PackedAttention
        if layer.submodules.mlp.module is MoELayer:
            layer.submodules.sharded_state_dict_keys_map.pop("pre_mlp_layernorm.", None)
            if grouped:
                layer.submodules.mlp.submodules.experts.module = GroupedExperts
    return block
