"""Parallel layout: how many processes a run has, and layouts that cannot work, refused by name.

Imports no torch: a layout is refused before any process starts.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from megatron_gpc.config import Config, ParallelConfig
from megatron_gpc.errors import UserError

MOST_PROCESSES, MOST_STEP_SAMPLES = 2**20, 2**22
"""Of a run, and of a training step."""
_NEED_CUDA = {  # fields of megatron-core's dataclasses
    "transformer": (
        *("fp8", "fp4", "tp_comm_overlap", "cpu_offloading", "fine_grained_activation_offloading"),
        *("gradient_accumulation_fusion", "apply_rope_fusion", "fused_single_qkv_rope"),
        *("masked_softmax_fusion", "persist_layer_norm", "memory_efficient_layer_norm"),
        *("moe_permute_fusion", "moe_router_fusion", "moe_enable_deepep"),
        *("enable_cuda_graph", "external_cuda_graph", "cuda_graph_impl"),
    ),
    "ddp": ("nccl_ub",),
    "optimizer": ("use_precision_aware_optimizer", "optimizer_cpu_offload"),
}


def model_parallel_size(parallel: ParallelConfig) -> int:
    """Processes that hold one copy of the policy."""
    return parallel.tp * parallel.pp * parallel.cp


def world_size(parallel: ParallelConfig) -> int:
    """Processes that `megatron-gpc train` starts when nobody else started them."""
    return model_parallel_size(parallel) * (parallel.dp or 1)


def nearest(value: int, fits: Callable[[int], bool], most: int) -> str:
    """The next numbers from 1 to `most` that fit, below and above one that does not: `2 or 4`."""
    below = next((n for n in range(min(value - 1, most), 0, -1) if fits(n)), None)
    above = next((n for n in range(value + 1, most + 1) if fits(n)), None)
    return " or ".join(str(n) for n in (below, above) if n is not None)


def check_world(parallel: ParallelConfig, started: int) -> None:
    """Hold the number of processes that torchrun or srun started to the configured layout.

    Raises:
        UserError: `started` is no multiple of tp * pp * cp, or contradicts parallel.dp.
    """
    copy = model_parallel_size(parallel)
    if started % copy:
        raise UserError(
            f"{started} processes were started, but parallel.tp * pp * cp = {copy} does not divide "
            f"that; start {nearest(started, lambda n: n % copy == 0, started + copy)}"
        )
    if parallel.dp is not None and started != copy * parallel.dp:
        raise UserError(
            f"{started} processes were started, but parallel.tp * pp * cp * dp = "
            f"{copy * parallel.dp}; start that many, or leave parallel.dp out"
            f" ({started // copy} follows)"
        )


def check_layout(config: Config, hf: dict[str, Any] | None, cuda: bool) -> None:
    """Refuse layouts that contradict themselves, the model or the machine.

    Args:
        config: the run.
        hf: the model's config.json; None if model.build has yet to make it, then only what does
            not depend on the model is checked.
        cuda: whether the run has CUDA devices.

    Raises:
        UserError: names the key and what would be valid.
    """
    p = config.parallel
    if (p.vpp or 1) > 1 and p.pp == 1:
        raise UserError(f"parallel.vpp={p.vpp} needs parallel.pp > 1; leave vpp out")
    if p.sequence_parallel and p.tp == 1:
        raise UserError("parallel.sequence_parallel=true needs parallel.tp > 1")
    if not cuda:
        _check_cpu(config)
    if p.ep > 1 and (p.dp or 1) * p.cp % p.ep:
        dp = nearest(p.dp or 1, lambda n: n * p.cp % p.ep == 0, (p.dp or 1) + p.ep)
        raise UserError(
            f"parallel.ep={p.ep} must divide parallel.dp * cp = {(p.dp or 1) * p.cp}; set "
            f"parallel.dp to {dp}"
        )
    if world_size(p) > MOST_PROCESSES:
        raise UserError(
            f"parallel.tp * pp * cp * dp = {world_size(p)} processes; {MOST_PROCESSES} are possible"
        )
    samples = config.rollout.prompts_per_step * config.rollout.group_size
    if samples > MOST_STEP_SAMPLES:
        raise UserError(
            f"rollout.prompts_per_step * group_size = {samples} samples of a step; lower them to "
            f"{MOST_STEP_SAMPLES} or fewer"
        )
    if samples < config.train.mini_batches:
        raise UserError(
            f"train.mini_batches={config.train.mini_batches} is more than the samples of a step, "
            f"rollout.prompts_per_step * group_size = {samples}"
        )
    r = config.rollout
    if r.max_staleness == 0 and (r.overlap or r.partial):
        name = "overlap" if r.overlap else "partial"
        raise UserError(
            f"rollout.{name}=true makes samples of older weights, and rollout.max_staleness=0 "
            "forbids them; set rollout.max_staleness to 1 or more"
        )
    if r.server.colocated and r.replay is None:
        _check_colocated(config, cuda)
    if r.server.sync == "distributed" and r.replay is None and cuda:
        _check_nccl(config)
    if r.server.urls and r.server.urls_file:
        raise UserError(
            "rollout.server.urls and rollout.server.urls_file both name the engines; leave one out"
        )
    if r.server.port and r.server.port + r.server.engines - 1 > 65535:
        raise UserError(
            f"rollout.server.port={r.server.port}: {r.server.engines} engines need as many ports "
            "from there on, and the last is 65535"
        )
    precision_aware = config.megatron.optimizer.get("use_precision_aware_optimizer")
    for key in ("entropy_change", "signal"):
        if precision_aware and getattr(config.diagnostics, key):
            raise UserError(
                f"diagnostics.{key} needs fp32 gradients and weights in the optimizer; leave "
                "megatron.optimizer.use_precision_aware_optimizer out"
            )
    if config.diagnostics.signal and r.prompts_per_step < 2:
        raise UserError(
            "diagnostics.signal compares two halves of a step's prompts, and "
            "rollout.prompts_per_step=1; set it to 2 or more, or diagnostics.signal to 0"
        )
    if config.train.routing_replay and r.replay is None:
        _check_routes(config)
    check_batch(config, p.dp or 1)
    if hf is not None:
        _check_model(p, hf)


def check_batch(config: Config, dp: int) -> None:
    """Refuse more data-parallel ranks than a mini-batch has samples: some would never have any.

    Raises:
        UserError: says how many there are.
    """
    samples = config.rollout.prompts_per_step * config.rollout.group_size
    smallest = samples // config.train.mini_batches
    if dp > smallest:
        raise UserError(
            f"parallel.dp={dp} is more than the {smallest} samples of a mini-batch "
            f"(rollout.prompts_per_step * group_size / train.mini_batches = {samples} / "
            f"{config.train.mini_batches}); lower it, or train.mini_batches"
        )


def _check_colocated(config: Config, cuda: bool) -> None:
    server, sglang = config.rollout.server, config.sglang
    reasons = {
        "rollout.overlap=true samples while the policy trains": config.rollout.overlap,
        "engines at rollout.server.urls or urls_file were not started for it, and only the run "
        "itself can end one that keeps its memory": bool(server.urls or server.urls_file),
        "rollout.server.sync=distributed makes trainer and engine two ranks of one GPU, which NCCL "
        "refuses (take disk or tensor)": server.sync == "distributed",
        "rollout.server.router=true asks engines for tokens to see whether they are well, also "
        "when they have no weights": server.router,
        "sglang.args.enable_memory_saver=false keeps the engines' memory": (
            server.kind == "sglang" and sglang.args.get("enable_memory_saver") is False
        ),
        "SGLang has GPU memory to release, and this machine has no GPU (the embedded server can "
        "take turns on a CPU)": server.kind == "sglang" and not cuda,
    }
    for reason, holds in reasons.items():
        if holds:
            raise UserError(f"rollout.server.colocated=true cannot work: {reason}")


def _check_routes(config: Config) -> None:
    server, sglang = config.rollout.server, config.sglang
    if server.router:
        raise UserError(
            "train.routing_replay=true needs answers that say which experts tokens went to, and "
            "sglang-router does not pass that on; set rollout.server.router=false"
        )
    if server.kind == "sglang" and sglang.args.get("enable_return_routed_experts") is False:
        raise UserError(
            "train.routing_replay=true needs engines that tell which experts tokens went to; leave "
            "sglang.args.enable_return_routed_experts out"
        )


def _check_nccl(config: Config) -> None:
    """On GPUs rank 0 broadcasts to the engines over NCCL, each process from a GPU of its own."""
    server, sglang = config.rollout.server, config.sglang
    if server.urls or server.urls_file:
        return  # who knows where they are
    reasons = {
        "engines on the CPU are out of NCCL's reach (take disk or tensor)": (
            server.kind == "embedded" or sglang.args.get("device") == "cpu"
        ),
        "the first engine would have GPU 0, as rank 0 has, and NCCL refuses two processes of one "
        "GPU (set sglang.args.base_gpu_id to the first that the policy leaves free, or take disk "
        "or tensor)": (
            not sglang.args.get("base_gpu_id") and "CUDA_VISIBLE_DEVICES" not in sglang.environment
        ),
    }
    for reason, holds in reasons.items():
        if holds:
            raise UserError(f"rollout.server.sync=distributed cannot work: {reason}")


def _check_cpu(config: Config) -> None:
    for section, names in _NEED_CUDA.items():
        for name in names:
            value = getattr(config.megatron, section).get(name)
            if value and value != "none":
                raise UserError(
                    f"megatron.{section}.{name}={value} needs CUDA and transformer-engine, which "
                    "this machine has not; leave it out on a CPU"
                )


def _check_model(p: ParallelConfig, hf: dict[str, Any]) -> None:
    for key in ("num_attention_heads", "num_hidden_layers"):
        if not isinstance(hf.get(key), int):
            raise UserError(f"model.hf: config.json lacks {key}, or it is no whole number")
    heads, layers = hf["num_attention_heads"], hf["num_hidden_layers"]
    experts = hf.get("num_experts") or hf.get("num_local_experts") or 0  # transformers 4, 5
    groups = hf.get("num_key_value_heads") or heads
    if heads % p.tp:
        raise UserError(
            f"parallel.tp={p.tp} does not divide the model's {heads} attention heads; set it to "
            f"{nearest(p.tp, lambda n: heads % n == 0, heads)}"
        )
    if groups % p.tp and p.tp % groups:
        raise UserError(
            f"parallel.tp={p.tp}: neither divides the model's {groups} key-value heads "
            "nor is a multiple of them; set it to "
            f"{nearest(p.tp, lambda n: not heads % n and not (groups % n and n % groups), heads)}"
        )
    width = hf.get("moe_intermediate_size") if experts else hf.get("intermediate_size")
    if isinstance(width, int) and width % p.tp:
        raise UserError(f"parallel.tp={p.tp} does not divide the feed-forward size {width}")
    stages = p.pp * (p.vpp or 1)
    if layers % stages:
        keys = f"parallel.pp * vpp = {stages}" if p.vpp else f"parallel.pp={p.pp}"
        raise UserError(
            f"{keys} does not divide the model's {layers} layers; set it to "
            f"{nearest(stages, lambda n: layers % n == 0, layers)}"
        )
    if p.ep > 1 and not experts:
        raise UserError(f"parallel.ep={p.ep}: the model has no experts")
    if experts and experts % p.ep:
        raise UserError(
            f"parallel.ep={p.ep} does not divide the model's {experts} experts; set it to "
            f"{nearest(p.ep, lambda n: experts % n == 0, experts)}"
        )
    if experts and p.tp > 1 and not p.sequence_parallel:
        raise UserError(
            "a mixture of experts with parallel.tp > 1 needs parallel.sequence_parallel=true"
        )
