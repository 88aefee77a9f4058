"""What thresholds by probability and diagnostics cost: ratios of step times, in one run.

    python tools/bench/update.py [--layers 4] [--hidden 256] [--vocab 8192] [--rounds 40]

A step is scoring a rollout and updating on it, mini-batch by mini-batch; sampling is left out, with
which all ratios would be nearer to 1.  The ways take turns in drawn order, so that what else the
machine does hits them alike, and without a GPU it is the process's CPU time that is taken.  What
counts are the ratios of each round; the table has their median and its 95 % interval.

    PPO         the textbook's clip with constants, and no region diagnostics
    GPC         thresholds by probability (ID's first step), and no region diagnostics
    regions     the same with what every step records of the entropy regions: what is shipped
    change      the same with diagnostics.entropy_change
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
from pathlib import Path
from random import Random
from typing import Any
from unittest.mock import patch

import torch
from rich.console import Console
from rich.table import Table

from megatron_gpc.algo.advantages import group_advantages
from megatron_gpc.algo.clipping import affine_bounds
from megatron_gpc.algo.losses import LossInputs, LossOutputs
from megatron_gpc.algo.losses.clip import clip
from megatron_gpc.batching import mini_batches, pack, token_streams
from megatron_gpc.cli import Parser, exit_code
from megatron_gpc.commands.arguments import number
from megatron_gpc.config.file import load
from megatron_gpc.metrics.reduce import Sums
from megatron_gpc.run.launch import run_ranks
from megatron_gpc.run.placement import Share
from megatron_gpc.types import Bounds, Prompt, RolloutBatch, Sample
from megatron_gpc.weights import family_of

ROOT = Path(__file__).resolve().parents[2]
PPO, GPC = affine_bounds((0.0, 0.2), (0.0, 0.2)), affine_bounds((-0.25, 0.5), (0.0, 0.2))
GROUPS, GROUP, PROMPT = 8, 8, 16


def textbook(inputs: LossInputs) -> LossOutputs:
    """PPO's clip as everyone writes it (arXiv 1707.06347, equation 7)."""
    advantages_T = inputs.advantages_T
    ratio_T = torch.exp(inputs.logp_T - inputs.streams.old_logp_T)
    clipped_T = torch.clamp(ratio_T, 0.8, 1.2)
    loss_sum = -torch.min(ratio_T * advantages_T, clipped_T * advantages_T).sum()
    ratio_T = ratio_T.detach()
    return LossOutputs(
        loss_sum=loss_sum,
        ratio_T=ratio_T,
        clipped_low_T=(ratio_T < 0.8) & (advantages_T < 0),
        clipped_high_T=(ratio_T > 1.2) & (advantages_T > 0),
    )


def rollout(vocab: int, tokens: int) -> RolloutBatch:
    """Random answers of one length with random rewards."""
    draw = torch.Generator().manual_seed(0)
    samples = []
    for index in range(GROUPS * GROUP):
        drawn = torch.randint(vocab, (PROMPT + tokens,), generator=draw).tolist()
        prompt = Prompt(index // GROUP, "", tuple(drawn[:PROMPT]), None)
        reward = float(torch.randint(2, (), generator=draw))
        spans = (("0", 0, tokens),)
        samples.append(
            Sample(
                *(prompt, index % GROUP, tuple(drawn[PROMPT:]), (-5.0,) * tokens),
                *("", "stop", spans, reward),
            )
        )
    rewards_N = torch.tensor([sample.reward for sample in samples])
    return pack(samples, group_advantages(rewards_N, torch.arange(len(samples)) // GROUP, "std"))


def now() -> float:
    """Seconds: of CPU time without a GPU, else of wall time."""
    if not torch.cuda.is_available():
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


def measure(folder: Path, rounds: int, tokens: int) -> dict[str, list[float]]:
    """Seconds of a step in every round, each way."""
    from megatron_gpc.mcore import policy as module
    from megatron_gpc.mcore.entropy_change import EntropyChange
    from megatron_gpc.mcore.setup import device, process_groups

    config = load(folder / "config.yaml")
    hf = json.loads((folder / "config.json").read_text())

    def without_regions(micro: Any, stats: Any, *, loss: Any, **given: Any) -> Any:
        streams = given["streams"].at(micro.slots_T.to(device()))
        result = loss(
            LossInputs(
                *(stats.logp_T, stats.entropy_T, streams.advantages_T, given["bounds"], streams),
                *given["mini_batch"],
            )
        )
        kept = dataclasses.replace(result, loss_sum=result.loss_sum.detach().clone())
        return result.loss_sum, module._count(micro, stats), (micro, kept, None)

    with process_groups(config):
        policy = module.Policy(config, family_of(hf).model_fields(hf))
        policy.weights_changed()
        batch = rollout(hf["vocab_size"], tokens)
        weights_T = torch.ones_like(batch.rollout_logp_T)
        updates = mini_batches(batch.num_samples, 4, 1, seed=0, step=1)

        def step(bounds: Bounds, change: bool = False) -> float:
            begin = now()
            scored = policy.score(batch)
            sums = Sums(module.UPDATE_MEANS, module.UPDATE_MAXIMA, device())
            measured = EntropyChange(policy, batch, scored) if change else None
            streams = token_streams(batch, scored.logp_T, weights_T)
            for samples in updates:
                policy.update(batch, samples, streams, bounds, sums)
            sums.reduce()
            if measured:
                measured.metrics()
            return now() - begin

        def bare(bounds: Bounds, loss: Any) -> float:
            def update_loss(micro: Any, stats: Any, **given: Any) -> Any:
                return without_regions(micro, stats, loss=loss, **given)

            with (
                patch.object(module, "_update_loss", update_loss),
                patch.object(module, "_add_regions", lambda *unused: None),
            ):
                return step(bounds)

        ways = {
            "PPO": lambda: bare(PPO, textbook),
            "GPC": lambda: bare(GPC, clip),
            "regions": lambda: step(GPC),
            "change": lambda: step(GPC, change=True),
        }
        seconds: dict[str, list[float]] = {name: [] for name in ways}
        draw = Random(0)
        for number in range(rounds + 1):
            for name in draw.sample(list(ways), len(ways)):
                taken = ways[name]()
                if number:  # the first round warms up
                    seconds[name].append(taken)
    return seconds


def rank(folder: Path, rounds: int, tokens: int) -> int:
    from megatron_gpc.mcore import cpu

    cpu.install()
    (folder / "found.json").write_text(json.dumps(measure(folder, rounds, tokens)))
    return 0


def interval(ordered: list[float]) -> str:
    """95 % interval of the median, from the binomial distribution's normal approximation."""
    out = math.floor((len(ordered) - 1.96 * math.sqrt(len(ordered))) / 2)
    return f"{ordered[out]:.4f} - {ordered[-1 - out]:.4f}" if out >= 0 else ""


def main() -> int:
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=number(int, 1), default=4)
    parser.add_argument("--hidden", type=number(int, 1), default=256)
    parser.add_argument("--vocab", type=number(int, 2), default=8192)
    parser.add_argument("--tokens", type=number(int, 1, 4000), default=8, help="of a response")
    parser.add_argument("--rounds", type=number(int, 1), default=40)
    parser.add_argument("--rank", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.rank:
        return rank(arguments.rank, arguments.rounds, arguments.tokens)
    from checkpoint import qwen2  # beside this script; ranks run it as a module

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "config.json").write_text(
            json.dumps(qwen2(arguments.layers, arguments.hidden, arguments.vocab))
        )
        (folder / "config.yaml").write_text(
            "run_dir: run\nmodel: {hf: .}\ndata: {prompts: none, verifier: addition}\n"
            "train: {micro_batch_size: 16}\noptim: {lr: 1.0e-7}\n"
        )
        os.chdir(ROOT)  # where ranks find this module
        given = [
            "--rank",
            name,
            "--rounds",
            f"{arguments.rounds}",
            "--tokens",
            f"{arguments.tokens}",
        ]
        if code := run_ranks(given, Share.alone(1), folder, module="tools.bench.update"):
            return code
        found = json.loads((folder / "found.json").read_text())
    table = Table(
        title=f"{arguments.layers} layers, hidden {arguments.hidden}, V = {arguments.vocab:,}; "
        f"{GROUPS * GROUP * arguments.tokens:,} response tokens, 4 updates"
    )
    for heading in ("", "median step [s]", "ratio", "95 %", "over"):
        table.add_column(heading, justify="right" if heading else "left")
    before = None
    for way, seconds in found.items():
        ratio = around = ""
        if before:
            ratios = sorted(a / b for a, b in zip(seconds, found[before], strict=True))
            ratio, around = f"{statistics.median(ratios):.4f}", interval(ratios)
        table.add_row(way, f"{statistics.median(seconds):.4f}", ratio, around, before or "")
        before = way
    Console(width=100).print(table)
    where = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    print(f"{platform.machine()} {where}; torch {torch.__version__}")
    return 0


if __name__ == "__main__":
    sys.exit(exit_code(main))
