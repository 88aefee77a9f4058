"""megatron-core's distributed checkpoint -> Hugging Face checkpoint, from any parallel layout.

Takes a checkpoint that training saved, such as RUN/checkpoints/step_000100, or a converted one.
Memory is that of the largest tensor, whatever the model.  Exit code 2: the input cannot be used,
and nothing was written.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from megatron_gpc.commands.arguments import number
from megatron_gpc.commands.conversion import DTYPES, converting
from megatron_gpc.weights.convert import megatron_to_hf


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--checkpoint", type=Path, required=True, help="folder to read")
    parser.add_argument("--out", type=Path, required=True, help="folder to make")
    parser.add_argument(
        "--hf",
        type=Path,
        help="folder whose configuration and tokenizer go along; left out: the checkpoint's own, "
        "or the one that the run started from",
    )
    parser.add_argument("--dtype", choices=DTYPES, help="of the weights; left out: as they are")
    parser.add_argument(
        "--max-shard-gb",
        type=number(float, 1e-6),
        default=5.0,
        help="largest safetensors file [GB] (%(default)s)",
    )


def run(arguments: argparse.Namespace) -> int:
    with converting() as track:
        megatron_to_hf(
            arguments.checkpoint,
            arguments.out,
            hf=arguments.hf,
            dtype=DTYPES.get(arguments.dtype),
            max_shard_bytes=int(arguments.max_shard_gb * 1e9),
            track=track,
        )
    print(f"{arguments.out} is ready for from_pretrained and SGLang")
    return 0
