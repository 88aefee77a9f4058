"""Checkpoints: what saving costs the training, synchronously and in the background, in one run.

    python tools/bench/checkpoint.py [--layers 8] [--hidden 768] [--vocab 32000] [--dtype bfloat16]

A Qwen2 of random weights at TP 2, with Adam's state.  Steps of the optimizer stand for the training
that goes on.  It is blocked in `save` and `poll`, and by what steps lose while the process in the
background shares the machine with them.  What counts are the ratios of one run.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from megatron_gpc.cli import Parser, exit_code
from megatron_gpc.commands.arguments import number
from megatron_gpc.config.file import load
from megatron_gpc.errors import UserError
from megatron_gpc.run.launch import run_ranks
from megatron_gpc.run.placement import Share
from megatron_gpc.weights import family_of

ROOT = Path(__file__).resolve().parents[2]
RANKS, REPEATS = 2, 3


def qwen2(layers: int, hidden: int, vocab: int) -> dict[str, Any]:
    """config.json of a Qwen2 with heads of 64 and a key-value head a rank."""
    if hidden % (64 * RANKS):
        raise UserError(f"--hidden: expected a multiple of {64 * RANKS}, got {hidden}")
    return {
        "model_type": "qwen2",
        "vocab_size": vocab,
        "hidden_size": hidden,
        "intermediate_size": hidden * 8 // 3 // 64 * 64,
        "num_hidden_layers": layers,
        "num_attention_heads": hidden // 64,
        "num_key_value_heads": RANKS,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10_000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
    }


def seconds(work: Callable[[], object]) -> float:
    begin = time.perf_counter()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - begin


def measure(folder: Path) -> dict[str, float]:
    """What every rank does; medians [s], and bytes."""
    from megatron_gpc.mcore.checkpoint.checkpoints import Checkpoints
    from megatron_gpc.mcore.checkpoint.folder import final_name
    from megatron_gpc.mcore.policy import Policy
    from megatron_gpc.mcore.setup import process_groups, sum_over_ranks
    from megatron_gpc.types import TrainState

    config = load(folder / "config.yaml")
    hf = json.loads((folder / "config.json").read_text())
    fields = family_of(hf).model_fields(hf)
    with process_groups(config):
        policy = Policy(config, fields)
        policy.weights_changed()
        for chunk in policy.chunks:
            for parameter in chunk.parameters():
                parameter.main_grad.normal_()

        def step() -> None:
            policy.optimizer.step()
            sum_over_ranks(torch.zeros(()))  # as in training, no rank runs ahead

        kinds = {
            name: dataclasses.replace(
                config, checkpoint=dataclasses.replace(config.checkpoint, asynchronous=background)
            )
            for name, background in (("synchronous", False), ("background", True))
        }
        savers = {name: Checkpoints(kind, policy) for name, kind in kinds.items()}
        seconds(step)  # makes Adam's state
        undisturbed = statistics.median(seconds(step) for _ in range(5))
        found = {"a step of the optimizer": undisturbed}
        number = 0
        for name, saver in savers.items():
            runs = []
            for _ in range(1 + REPEATS):  # the first plans, which the others need not
                number += 1
                begin = time.perf_counter()
                pauses = [seconds(lambda s=saver, n=number: s.save(TrainState(n)))]
                lost = 0.0
                while not final_name(config.run_dir, number).exists():
                    lost += max(0.0, seconds(step) - undisturbed)
                    pauses.append(seconds(saver.poll))
                runs.append((sum(pauses) + lost, sum(pauses), time.perf_counter() - begin))
            found[f"first {name}"] = runs[0][0]
            for what, values in zip(
                ("blocked", "in save and poll", "until complete"),
                zip(*runs[1:], strict=True),
                strict=True,
            ):
                found[f"{what} {name}"] = statistics.median(values)
        last = final_name(config.run_dir, number)
        found["bytes"] = sum(file.stat().st_size for file in last.iterdir())
        fresh = Policy(config, fields)  # as a new process would make it
        found["resume"] = seconds(Checkpoints(config, fresh).resume)
    return found


def rank(folder: Path) -> int:
    from megatron_gpc.mcore import cpu

    cpu.install()
    found = measure(folder)
    if os.environ["RANK"] == "0":
        (folder / "found.json").write_text(json.dumps(found))
    return 0


def main() -> int:
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=number(int, 1), default=8)
    parser.add_argument("--hidden", type=number(int, 1), default=768)
    parser.add_argument("--vocab", type=number(int, RANKS), default=32_000)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="bfloat16")
    parser.add_argument("--folder", type=Path, help="disk to measure; default: for temporary files")
    parser.add_argument("--rank", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.rank:
        return rank(arguments.rank)
    hf = qwen2(arguments.layers, arguments.hidden, arguments.vocab)
    size = sum(math.prod(param.shape) for param in family_of(hf).params(hf, RANKS))
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        folder = Path(name)
        (folder / "config.json").write_text(json.dumps(hf))
        (folder / "config.yaml").write_text(
            f"run_dir: run\nmodel: {{hf: ., dtype: {arguments.dtype}}}\nparallel: {{tp: {RANKS}}}\n"
            "data: {prompts: none, verifier: addition}\ncheckpoint: {keep: 1}\n"
        )
        os.chdir(ROOT)  # where ranks find this module
        share = Share.alone(RANKS)
        if code := run_ranks(["--rank", name], share, folder, module="tools.bench.checkpoint"):
            return code
        found = json.loads((folder / "found.json").read_text())
    table = Table(title=f"{size / 1e6:.0f} M parameters, {arguments.dtype}, TP {RANKS}; seconds")
    for heading in ("", "synchronous", "background", "ratio"):
        table.add_column(heading, justify="right" if heading else "left")
    for what in ("blocked", "in save and poll", "until complete"):
        one, other = found[f"{what} synchronous"], found[f"{what} background"]
        table.add_row(what, f"{one:.2f}", f"{other:.2f}", f"{one / other:.2f}")
    one, other = found["first synchronous"], found["first background"]
    table.add_row("blocked by the first", f"{one:.2f}", f"{other:.2f}", f"{one / other:.2f}")
    Console(width=100).print(table)
    print(
        f"{found['bytes'] / 1e9:.2f} GB, {found['bytes'] / size:.2f} bytes a parameter; resuming, "
        f"every file verified: {found['resume']:.2f} s; "
        f"a step of the optimizer: {found['a step of the optimizer']:.2f} s"
    )
    where = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    print(f"{platform.machine()} {where}, {RANKS} ranks; torch {torch.__version__}")
    return 0


if __name__ == "__main__":
    sys.exit(exit_code(main))
