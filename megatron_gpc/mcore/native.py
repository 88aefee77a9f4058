"""megatron-core's own configuration dataclasses, filled from ours.

Whatever those dataclasses offer can be set under `megatron.*`; names are checked against them.
"""

from __future__ import annotations

import dataclasses
import difflib
import importlib.util

import torch
from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.optimizer import OptimizerConfig
from megatron.core.transformer import TransformerConfig

from megatron_gpc.config import Config
from megatron_gpc.errors import UserError
from megatron_gpc.weights import ModelFields

HAVE_TE = torch.cuda.is_available() and importlib.util.find_spec("transformer_engine") is not None
"""transformer-engine serves CUDA only; without CUDA the local layer spec is used."""

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
_ACTIVATIONS = {"silu": torch.nn.functional.silu}
_OWN_KEYS = {  # fields that follow from keys of ours, where setting them too could contradict
    "tensor_model_parallel_size": "parallel.tp",
    "pipeline_model_parallel_size": "parallel.pp",
    "virtual_pipeline_model_parallel_size": "parallel.vpp",
    "context_parallel_size": "parallel.cp",
    "expert_model_parallel_size": "parallel.ep",
    "sequence_parallel": "parallel.sequence_parallel",
    "params_dtype": "model.dtype",
    "pipeline_dtype": "model.dtype",
    "bf16": "model.dtype",
    "use_distributed_optimizer": "optim.distributed",
    "lr": "optim.lr",
    "adam_beta1": "optim.beta1",
    "adam_beta2": "optim.beta2",
    "adam_eps": "optim.eps",
    "weight_decay": "optim.weight_decay",
    "clip_grad": "optim.clip_grad",
    "calculate_per_token_loss": None,  # the loss relies on it: see mcore/policy.py
}


def have_apex() -> bool:
    """Whether NVIDIA's apex is here; PyPI's `apex` is another project and lacks this module."""
    return importlib.util.find_spec("fused_weight_gradient_mlp_cuda") is not None


def check_overrides(config: Config) -> None:
    """Hold the names under `megatron.*` to megatron-core's dataclasses.

    Raises:
        UserError: an unknown field (names the nearest), or one that has a key of its own.
    """
    for section, kind in (
        ("transformer", TransformerConfig),
        ("ddp", DistributedDataParallelConfig),
        ("optimizer", OptimizerConfig),
    ):
        valid = [f.name for f in dataclasses.fields(kind) if f.init]
        for name in getattr(config.megatron, section):
            if name in _OWN_KEYS:
                key = _OWN_KEYS[name]
                raise UserError(
                    f"megatron.{section}.{name} cannot be set here; "
                    + (f"set {key}" if key else "the loss depends on it")
                )
            if name not in valid:
                near = difflib.get_close_matches(name, valid, n=1)
                hint = f"; did you mean {near[0]!r}?" if near else ""
                raise UserError(
                    f"megatron.{section}.{name}: {kind.__name__} has no such field{hint}"
                )


def transformer_config(config: Config, model: ModelFields) -> TransformerConfig:
    """The model's TransformerConfig at the configured layout."""
    p, dtype, cuda = config.parallel, _DTYPES[config.model.dtype], torch.cuda.is_available()
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
        "variable_seq_lengths": p.pp > 1,  # micro-batches differ in length
        "moe_token_dispatcher_type": "alltoall",
        # Fused kernels live in apex, in transformer-engine or on a GPU.
        "gradient_accumulation_fusion": cuda and have_apex(),
        "apply_rope_fusion": HAVE_TE,
        "masked_softmax_fusion": HAVE_TE,
        "bias_activation_fusion": cuda,
        "bias_dropout_fusion": cuda,
        "persist_layer_norm": HAVE_TE,
        **model.transformer,
        **config.megatron.transformer,
    }
    fields["activation_func"] = _ACTIVATIONS[fields["activation_func"]]
    made = TransformerConfig(**fields)
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
            **config.megatron.ddp,
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
            **config.megatron.optimizer,
        }
    )
