"""Hugging Face checkpoint -> megatron-core's distributed checkpoint, for any parallel layout.

Train from the result with model.hf=OUT.  Memory is that of the largest tensor, whatever the model.
Exit code 2: the input cannot be used, and nothing was written.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from megatron_gpc.commands.conversion import DTYPES, converting
from megatron_gpc.weights.convert import hf_to_megatron


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--hf", type=Path, required=True, help="Hugging Face folder to read")
    parser.add_argument("--out", type=Path, required=True, help="folder to make")
    parser.add_argument("--dtype", choices=DTYPES, help="of the weights; left out: as they are")


def run(arguments: argparse.Namespace) -> int:
    with converting() as track:
        notes = hf_to_megatron(arguments.hf, arguments.out, DTYPES.get(arguments.dtype), track)
    for note in notes:
        print(f"note: {note}")
    print(f"{arguments.out} is ready; train from it with model.hf={arguments.out}")
    return 0
