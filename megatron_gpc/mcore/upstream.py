"""Faults of megatron-core and torch, mended wherever what they need is missing, with a GPU or not.

What megatron-core needs on a CPU beside that is in cpu.py.  Each patch says why upstream needs it
and when it can go.  Written for megatron-core 0.16.1.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch


def core(name: str) -> Any:
    return importlib.import_module(f"megatron.core.{name}")


def mend() -> None:
    """Put every patch in place; once a process, after megatron-core's modules are imported."""
    _patch_checkpoint_writer()
    _patch_checkpoint_objects()
    _patch_router()
    _patch_norms()
    _patch_optimizer_state()


def _patch_router() -> None:
    """The router of experts works without transformer-engine.

    Why: moe_utils tests `te_general_gemm is not None` but defines the name only beside
    transformer-engine.  Gone when: the name is defined.
    """
    core("transformer.moe.moe_utils").__dict__.setdefault("te_general_gemm", None)


class _ParallelNorm:
    """torch's norm, its weights marked for sequence parallelism."""

    def __new__(
        cls, config: Any, hidden_size: int, eps: float = 1e-5, **unused: Any
    ) -> torch.nn.Module:
        assert not config.layernorm_zero_centered_gamma and not config.memory_efficient_layer_norm
        kind = {"RMSNorm": torch.nn.RMSNorm, "LayerNorm": torch.nn.LayerNorm}[config.normalization]
        norm = kind(hidden_size, eps=eps, dtype=config.params_dtype)
        for weight in norm.parameters():
            # finalize_model_grads sums the gradients so marked over the tensor-parallel group
            weight.sequence_parallel = config.sequence_parallel
        return norm


def _patch_norms() -> None:
    """The local spec's norm is torch's, and works under sequence parallelism.

    Why: WrappedTorchNorm asserts that sequence parallelism is off; past the assert, unmarked, norm
    gradients would not be summed over TP (off by 0.8-1.0 while the loss is right).  Beside apex the
    norm after the last layer would be apex's FusedLayerNorm, which refuses RMSNorm.
    Gone when: WrappedTorchNorm sets the mark, and every RMSNorm is one.
    """
    for name in ("models.backends", "models.gpt.gpt_layer_specs"):
        module = core(name)
        module.WrappedTorchNorm = module.LNImpl = _ParallelNorm


def _patch_optimizer_state() -> None:
    """The distributed optimizer saves and loads the state of torch's own Adam.

    Why: without transformer-engine and apex, state_dict() fails before the first step (torch's Adam
    has no state yet), and always on a stage without experts, whose expert optimizer has no
    parameters; loading raises KeyError 'step', and would leave one "step" tensor shared by all
    parameters, which Adam advances once for each.
    Gone when: core reads the state of torch.optim.Adam.
    """
    module = core("optimizer.distrib_optimizer")
    if module.HAVE_APEX_OR_TE:
        return
    optimizer = module.DistributedOptimizer
    state_dict = optimizer.state_dict
    set_states = optimizer._set_main_param_and_optimizer_states

    def filled_state_dict(self: Any) -> Any:
        for group in self.optimizer.param_groups:
            for p in group["params"]:
                if not self.optimizer.state[p]:
                    self.optimizer.state[p].update(
                        step=torch.zeros(()),
                        exp_avg=torch.zeros_like(p),
                        exp_avg_sq=torch.zeros_like(p),
                    )
        if not self.optimizer.state:
            self.optimizer.state["no parameters"]["step"] = torch.zeros(())
        return state_dict(self)

    def set_states_with_step(self: Any, model_param: Any, tensors: dict[str, Any]) -> None:
        group, order = self.model_param_group_index_map[model_param]
        state = self.optimizer.state[self.optimizer.param_groups[group]["params"][order]]
        state["step"] = state["step"].clone()
        set_states(self, model_param, {"step": state["step"], **tensors})

    optimizer.state_dict = filled_state_dict
    optimizer._set_main_param_and_optimizer_states = set_states_with_step


def _patch_checkpoint_writer() -> None:
    """No process is started to collect what checkpoint writers report.

    Why: planning a save starts a multiprocessing manager in every rank.  It outlives a rank that is
    killed, imports the main script again, and costs the first save 6 s; nobody needs it, because
    mcore/checkpoint/writer.py reports through a pipe.
    Gone when: core starts it only if it is used, while writing.
    """
    core("dist_checkpointing.strategies.filesystem_async")._get_write_results_queue = lambda: None


def _patch_checkpoint_objects() -> None:
    """Objects of a checkpoint that are no tensors are read without pickle's powers first.

    Why: torch unpickles them as they are (weights_only=False), so that whoever wrote a `.distcp`
    file, or says in `.metadata` that a tensor is such an object, could run any code.  What passes
    has the classes of data alone, and to let torch read it after that is safe.
    Gone when: torch's load planner asks for weights_only.
    """
    planner = importlib.import_module("torch.distributed.checkpoint.default_planner")
    load_bytes = planner.DefaultLoadPlanner.load_bytes

    def checked_load_bytes(self: Any, read_item: Any, value: Any) -> None:
        torch.load(value, weights_only=True)
        value.seek(0)
        load_bytes(self, read_item, value)

    planner.DefaultLoadPlanner.load_bytes = checked_load_bytes
