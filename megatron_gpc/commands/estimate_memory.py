"""How much GPU memory a configuration takes, by bookkeeping.

Weights (2 B a parameter in bf16), gradients (4 B), Adam with its fp32 copy (12 B, cut over
data-parallel ranks), activations with or without recomputation, logits; then what the engine on the
same GPU takes, and how many tokens its KV cache holds.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from megatron_gpc.commands.arguments import add_configuration, number
from megatron_gpc.config.file import load
from megatron_gpc.config.layout import check_layout, world_size
from megatron_gpc.doctor.memory import estimate, lines
from megatron_gpc.weights.folders import read_hf_config


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_configuration(parser)
    parser.add_argument(
        "--model", type=Path, help="folder with the model's config.json (default: model.hf)"
    )
    parser.add_argument(
        "--gpu-gib",
        type=number(float, 1e-3),
        default=79.6,
        help="of a GPU (%(default)s: H100 80 GB)",
    )


def run(arguments: argparse.Namespace) -> int:
    config = load(arguments.config, arguments.overrides)
    hf = read_hf_config(arguments.model or config.model.hf)
    check_layout(config, hf, cuda=True)
    world = world_size(config.parallel)
    fraction = float(config.sglang.args.get("mem_fraction_static", 0.0))
    print(f"{world} GPUs: {arguments.config}")
    print("\n".join(lines(estimate(config, hf, world), arguments.gpu_gib, fraction)))
    return 0
