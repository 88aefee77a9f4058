"""What a configuration asks for, against what is here."""

from __future__ import annotations

import os
from collections.abc import Iterator

import torch

from megatron_gpc.config import Config
from megatron_gpc.config.layout import check_batch, model_parallel_size, world_size
from megatron_gpc.doctor.finding import Finding
from megatron_gpc.doctor.memory import GIB, estimate
from megatron_gpc.doctor.preflight import check_training
from megatron_gpc.errors import UserError
from megatron_gpc.run import environment
from megatron_gpc.run.placement import gpus_for_ranks
from megatron_gpc.weights.folders import read_hf_config


def plan(config: Config, whole: bool) -> Iterator[Finding]:
    """Whether the configuration can run here.

    Args:
        whole: also read what one of several processes reads for all, see `check_training`.
    """
    told: list[str] = []
    try:
        check_training(config, told.append, whole)
        yield Finding("configuration", "ok", "accepted, model included")
        yield from (Finding("prompts", "note", text) for text in told)
    except UserError as error:
        yield Finding("configuration", "problem", str(error), "mend it, or mount the folder")
        return
    if config.model.build is not None and not config.model.hf.exists():
        yield Finding("model.hf", "note", "not there yet", "model.build makes it at the first run")
    yield from _gpus(config)


def _gpus(config: Config) -> Iterator[Finding]:
    _, nodes = environment.step()
    try:
        gpus = gpus_for_ranks(config, torch.cuda.device_count())
    except UserError as error:
        yield Finding("ranks", "problem", str(error), "take fewer engines, or another base_gpu_id")
        return
    world, copy = world_size(config.parallel), model_parallel_size(config.parallel)
    if not gpus:
        cores = len(os.sched_getaffinity(0))
        status = "note" if world > cores * nodes else "ok"
        advice = "it runs, slowly: more ranks than cores" if status == "note" else ""
        found = f"{world} on {nodes} nodes of {cores} cores, no GPU"
        yield Finding("ranks", status, found, advice)
        return
    there = nodes * gpus
    fits = there % copy == 0 if config.parallel.dp is None else there == world
    if not fits:
        found = f"{nodes} nodes of {gpus} GPUs; parallel.* wants {world} ranks"
        advice = f"change --nodes, --gpus-per-node or parallel.* (a policy takes {copy} GPUs)"
        yield Finding("ranks", "problem", found, advice)
        return
    try:
        check_batch(config, there // copy)
    except UserError as error:
        yield Finding("ranks", "problem", str(error), "take fewer nodes, or another layout")
        return
    yield Finding("ranks", "ok", f"one on each of {there} GPUs")
    if not config.model.hf.exists():
        return  # model.build has yet to make it
    hf = read_hf_config(config.model.hf)
    total = torch.cuda.get_device_properties(0).total_memory
    server = config.rollout.server
    elsewhere = bool(server.urls or server.urls_file)
    fraction = float(config.sglang.args.get("mem_fraction_static", 0.0))
    engine = 0.0 if elsewhere else fraction * total
    wanted = estimate(config, hf, there).trainer + engine
    found = f"{wanted / GIB:.0f} of {total / GIB:.0f} GiB a GPU, estimated"
    if wanted > total:
        advice = "raise parallel.*, recompute, or lower sglang.args.mem_fraction_static"
        yield Finding("GPU memory", "problem", found, advice)
    else:
        yield Finding("GPU memory", "ok", found)
