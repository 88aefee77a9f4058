"""megatron-core's own configuration dataclasses, filled from ours.

What those dataclasses offer can be set under `megatron.*`, but for what follows from the model or
from keys of ours; names and types are checked against them.
"""

from __future__ import annotations

import difflib
import enum
import importlib.util
import typing
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.optimizer import OptimizerConfig
from megatron.core.transformer import TransformerConfig
from pydantic import TypeAdapter, ValidationError
from pydantic.errors import PydanticUserError

from megatron_gpc.config import Config
from megatron_gpc.config.types import MOST
from megatron_gpc.errors import UserError
from megatron_gpc.weights import ModelFields

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
_ACTIVATIONS = {"silu": torch.nn.functional.silu}
_OPTIMIZERS = ("adam", "sgd")
"""Those that megatron-core makes of this field."""
_SECTIONS = {
    "transformer": TransformerConfig,
    "ddp": DistributedDataParallelConfig,
    "optimizer": OptimizerConfig,
}
_OWN_KEYS = {  # fields that follow from keys of ours; setting them too could contradict those
    "tensor_model_parallel_size": "parallel.tp",
    "pipeline_model_parallel_size": "parallel.pp",
    "virtual_pipeline_model_parallel_size": "parallel.vpp",
    "context_parallel_size": "parallel.cp",
    "expert_model_parallel_size": "parallel.ep",
    "expert_tensor_parallel_size": "parallel.tp",
    "sequence_parallel": "parallel.sequence_parallel",
    "moe_enable_routing_replay": "train.routing_replay",
    "moe_grouped_gemm": "train.experts",
    "moe_use_legacy_grouped_gemm": "train.experts",
    "params_dtype": "model.dtype",
    "pipeline_dtype": "model.dtype",
    "bf16": "model.dtype",
    "fp16": "model.dtype",
    "use_distributed_optimizer": "optim.distributed",
    "lr": "optim.lr",
    "min_lr": "optim.min_lr",
    "adam_beta1": "optim.beta1",
    "adam_beta2": "optim.beta2",
    "adam_eps": "optim.eps",
    "weight_decay": "optim.weight_decay",
    "clip_grad": "optim.clip_grad",
}
_MODEL_FIELDS = {
    # what weights/families.py sets
    *("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads"),
    *("num_query_groups", "kv_channels", "normalization", "layernorm_epsilon"),
    *("gated_linear_unit", "activation_func", "add_bias_linear", "add_qkv_bias"),
    *("qk_layernorm", "attention_dropout", "hidden_dropout", "num_moe_experts"),
    *("moe_ffn_hidden_size", "moe_layer_freq", "moe_router_topk", "moe_router_pre_softmax"),
    *("moe_router_score_function", "moe_router_dtype", "moe_router_load_balancing_type"),
    *("moe_aux_loss_coeff", "moe_shared_expert_intermediate_size", "moe_shared_expert_gate"),
    # what would make another model of it
    *("rotary_interleaved", "no_rope_freq", "mrope_section", "window_size"),
    *("window_attn_skip_freq", "softmax_scale", "softmax_type", "qk_l2_norm"),
    *("attention_output_gate", "multi_latent_attention", "experimental_attention_variant"),
    *("layernorm_zero_centered_gamma", "glu_linear_offset"),
    *("apply_residual_connection_post_layernorm", "activation_func_clamp_value"),
    *("mtp_num_layers", "moe_router_num_groups", "moe_router_group_topk"),
    *("moe_router_topk_limited_devices", "moe_router_topk_scaling_factor"),
    *("moe_router_enable_expert_bias", "moe_router_force_load_balancing"),
    *("moe_input_jitter_eps", "moe_apply_probs_on_input", "moe_latent_size"),
    *("moe_expert_capacity_factor", "moe_token_dropping", "is_hybrid_model"),
    "heterogeneous_block_specs",
}
_RELIED_ON = {
    "calculate_per_token_loss": "the loss relies on it (mcore/policy.py)",
    "perform_initialization": "the gradient norm relies on it",
    "init_model_with_meta_device": "weights are copied into the model once it is built",
    "variable_seq_lengths": "it follows from the micro-batches of every pass (mcore/policy.py)",
    # with them a rank's parameters are whole only once the next forward pass has gathered them
    "overlap_param_gather": "weights are handed over right after an update",
    "overlap_param_gather_with_optimizer_step": "weights are handed over right after an update",
}


def uses_transformer_engine(dtype: torch.dtype) -> bool:
    """Whether the policy's layers are transformer-engine's and not megatron-core's local ones.

    It serves CUDA only, and there 16 bits: it has no kernel for packed sequences of fp32, and
    multiplies fp32 matrices in TF32.  (That it can be imported, mcore/cpu.py has seen.)
    """
    return (
        dtype is not torch.float32
        and torch.cuda.is_available()
        and importlib.util.find_spec("transformer_engine") is not None
    )


def have_apex() -> bool:
    """Whether NVIDIA's apex is here; PyPI's `apex` is another project and lacks this module."""
    return importlib.util.find_spec("fused_weight_gradient_mlp_cuda") is not None


def check_overrides(config: Config, model: ModelFields | None) -> None:
    """Check what is set under `megatron.*` against megatron-core's dataclasses.

    Args:
        model: None if model.build has not made it yet; then only fields are checked, one by one.

    Raises:
        UserError: an unknown field (names the nearest), one that is not free to be set, a value of
            another type, or fields that megatron-core says contradict each other.
    """
    for section in _SECTIONS:
        _overrides(config, section)
    if model is not None:
        try:
            transformer_config(config, model)
            ddp_config(config)
            optimizer_config(config)
        except (ValueError, AssertionError) as error:  # how those dataclasses check themselves
            raise UserError(f"under megatron: {error}") from None


def _overrides(config: Config, section: str) -> dict[str, Any]:
    """megatron.SECTION, each value in the type of its field; raises as check_overrides."""
    kind = _SECTIONS[section]
    types = typing.get_type_hints(kind)
    found = {}
    for name, value in getattr(config.megatron, section).items():
        key = f"megatron.{section}.{name}"
        if name in _OWN_KEYS:
            raise UserError(f"{key} cannot be set here; set {_OWN_KEYS[name]}")
        if name in _MODEL_FIELDS:
            raise UserError(f"{key} cannot be set; it follows from model.hf")
        if name in _RELIED_ON:
            raise UserError(f"{key} cannot be set; {_RELIED_ON[name]}")
        if name not in types:
            near = difflib.get_close_matches(name, types, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise UserError(f"{key}: {kind.__name__} has no such field{hint}")
        found[name] = _in_type(key, value, types[name])
    return found


def _in_type(key: str, value: Any, kind: Any) -> Any:
    """A value of a YAML file as a field's annotation wants it; enumerations go by their names."""
    if isinstance(kind, type) and issubclass(kind, enum.Enum):
        if value not in kind.__members__:
            raise UserError(f"{key}: expected one of {', '.join(kind.__members__)}, got {value!r}")
        return kind[value]
    try:
        adapter = TypeAdapter(kind)
        adapter.json_schema()  # refuses what no text can say, such as a function
        found = adapter.validate_python(value)
    except PydanticUserError:
        raise UserError(f"{key} cannot be set in a configuration: it is of type {kind}") from None
    except ValidationError as error:
        what = error.errors()[0]["msg"]
        raise UserError(f"{key}: {what[0].lower()}{what[1:]}, got {value!r}") from None
    if isinstance(found, int) and not 0 <= found <= MOST:
        raise UserError(f"{key}: expected a number from 0 to {MOST}, got {found}")
    if key == "megatron.optimizer.optimizer" and found not in _OPTIMIZERS:
        raise UserError(f"{key}: expected one of {', '.join(_OPTIMIZERS)}, got {found!r}")
    return found


def transformer_config(config: Config, model: ModelFields) -> TransformerConfig:
    """The model's TransformerConfig at the configured layout."""
    p, dtype, cuda = config.parallel, _DTYPES[config.model.dtype], torch.cuda.is_available()
    with_te = uses_transformer_engine(dtype)
    fields = {
        "tensor_model_parallel_size": p.tp,
        "pipeline_model_parallel_size": p.pp,
        "virtual_pipeline_model_parallel_size": p.vpp,
        "context_parallel_size": p.cp,
        "expert_model_parallel_size": p.ep,
        "sequence_parallel": p.sequence_parallel,
        "params_dtype": dtype,
        "pipeline_dtype": dtype,
        "bf16": dtype is torch.bfloat16,
        "calculate_per_token_loss": True,  # losses sum; finalize_model_grads divides, once
        # Every weight comes from a checkpoint, but core marks weights as tensor-parallel only while
        # it initializes them, and the gradient norm relies on the mark.
        "perform_initialization": True,
        "attention_softmax_in_fp32": True,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "batch_p2p_comm": not p.vpp,
        "overlap_p2p_comm": bool(p.vpp),
        "variable_seq_lengths": p.pp > 1,  # mcore/policy.py sets it for every pass anew
        "moe_token_dispatcher_type": "alltoall",
        # Fused kernels live in apex, in transformer-engine or on a GPU.
        "gradient_accumulation_fusion": cuda and have_apex(),
        "apply_rope_fusion": with_te,
        "masked_softmax_fusion": with_te,
        "bias_activation_fusion": cuda,
        "bias_dropout_fusion": False,  # there is no dropout: an addition is left
        "persist_layer_norm": with_te,
        **model.transformer,
        **_overrides(config, "transformer"),
    }
    fields["activation_func"] = _ACTIVATIONS[fields["activation_func"]]
    made = TransformerConfig(**fields)
    if config.train.routing_replay and made.moe_router_fusion:
        raise UserError(
            "megatron.transformer.moe_router_fusion=true leaves no room for train.routing_replay; "
            "leave one out"
        )
    for name, value in model.config_attributes.items():
        setattr(made, name, value)
    return made


def ddp_config(config: Config) -> DistributedDataParallelConfig:
    """How gradients are reduced: in fp32, cut over ranks with the distributed optimizer."""
    return DistributedDataParallelConfig(
        **{
            "grad_reduce_in_fp32": True,
            "use_distributed_optimizer": config.optim.distributed,
            "overlap_grad_reduce": torch.cuda.is_available(),
            **_overrides(config, "ddp"),
        }
    )


def optimizer_config(config: Config) -> OptimizerConfig:
    """Adam over fp32 main parameters."""
    o, dtype = config.optim, _DTYPES[config.model.dtype]
    return OptimizerConfig(
        **{
            "optimizer": "adam",
            "lr": o.lr,
            "min_lr": o.min_lr,
            "adam_beta1": o.beta1,
            "adam_beta2": o.beta2,
            "adam_eps": o.eps,
            "weight_decay": o.weight_decay,
            "clip_grad": o.clip_grad,
            "bf16": dtype is torch.bfloat16,
            "params_dtype": dtype,
            "use_distributed_optimizer": o.distributed,
            **_overrides(config, "optimizer"),
        }
    )
