"""How much GPU memory a configuration takes, by bookkeeping (megatron_gpc/doctor/memory.py).

    python tools/estimate_memory.py examples/qwen3-32b/config.yaml --model tests/recipes/qwen3-32b

Weights (2 B a parameter in bf16), gradients (4 B), Adam with its fp32 copy (12 B, cut over
data-parallel ranks), activations with or without recomputation, logits; then what the engine on the
same GPU takes, and how many tokens its KV cache holds.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from megatron_gpc.commands.script import positive, run
from megatron_gpc.config.file import load
from megatron_gpc.config.layout import check_layout, world_size
from megatron_gpc.doctor.memory import estimate, lines
from megatron_gpc.weights.folders import read_hf_config


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("config", type=Path, help="YAML file")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="replace a key")
    parser.add_argument(
        "--model", type=Path, help="folder with the model's config.json (default: model.hf)"
    )
    parser.add_argument(
        "--gpu-gib", type=positive(float), default=79.6, help="of a GPU (%(default)s: H100 80 GB)"
    )
    arguments = parser.parse_args()
    config = load(arguments.config, arguments.overrides)
    hf = read_hf_config(arguments.model or config.model.hf)
    check_layout(config, hf, cuda=True)
    world = world_size(config.parallel)
    fraction = float(config.sglang.args.get("mem_fraction_static", 0.0))
    print(f"{world} GPUs: {arguments.config}")
    print("\n".join(lines(estimate(config, hf, world), arguments.gpu_gib, fraction)))
    return 0


if __name__ == "__main__":
    sys.exit(run(main))
