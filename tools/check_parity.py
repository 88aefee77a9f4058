"""The same prompts through transformers and through Megatron, in float32.

    python tools/check_parity.py --hf DIR --checkpoint DIR [--tp N] [--pp N] [--ep N]

The checkpoint is a converted one, or one that training saved.  Starts tp * pp * ep processes.  Exit
codes: 0 the same; 1 the largest difference of log-probabilities is beyond the tolerance; 2 the
input cannot be used; 3 a process failed.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table

from megatron_gpc.commands.parity import RanksFailed, measure, prompts
from megatron_gpc.commands.script import positive, run
from megatron_gpc.config import ParallelConfig
from megatron_gpc.weights import family_of
from megatron_gpc.weights.folders import read_hf_config

TOLERANCE = 1e-3
"""On log-probabilities in float32: rounding stays below it in deep models too; a wrong weight,
rotary base or norm exceeds it by orders of magnitude."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--hf", type=Path, required=True, help="Hugging Face folder")
    parser.add_argument("--checkpoint", type=Path, required=True, help="distributed checkpoint")
    for name, meaning in (("tp", "tensor"), ("pp", "pipeline"), ("ep", "expert")):
        parser.add_argument(
            f"--{name}", type=positive(int), default=1, help=f"{meaning} parallelism"
        )
    parser.add_argument(
        "--tolerance", type=float, default=TOLERANCE, help="largest difference (%(default)s)"
    )
    arguments = parser.parse_args()
    hf_config = read_hf_config(arguments.hf)
    is_moe = "num_moe_experts" in family_of(hf_config).model_fields(hf_config).transformer
    parallel = ParallelConfig(
        tp=arguments.tp,
        pp=arguments.pp,
        ep=arguments.ep,
        dp=arguments.ep,
        # megatron-core wants it of a mixture of experts
        sequence_parallel=is_moe and arguments.tp > 1,
    )
    try:
        found = measure(arguments.hf, arguments.checkpoint, parallel, prompts(arguments.hf))
    except RanksFailed as error:  # which has been printed
        return 2 if error.args[0] == 2 else 3
    same = found.largest <= arguments.tolerance  # False where it is not a number
    table = Table(title=f"tp {parallel.tp}, pp {parallel.pp}, ep {parallel.ep}; float32")
    table.add_column("Megatron against transformers")
    table.add_column("", justify="right")
    table.add_row("largest difference of log-probs", f"{found.largest:.2e}")
    table.add_row("mean difference of log-probs", f"{found.mean:.2e}")
    table.add_row("greedy agreement", f"{found.agreement:.2%} of {found.positions} positions")
    table.add_row("tolerance", f"{arguments.tolerance:.2e}")
    table.add_row("verdict", "the same" if same else "DIFFERENT")
    Console(width=80).print(table)
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(run(main))
