"""Weights to engines of this host: every `sync` and kind of engine beside a plain copy of them.

    python tools/bench/handover.py [--layers 24] [--hidden 1024] [--rounds 5] [KEY=VALUE ...]

A Qwen2 of random fp32 weights, one process with one thread, and real engines: the embedded server,
and SGLang if it is given:

    python tools/bench/handover.py sglang.python=/envs/sglang/bin/python sglang.args.device=cpu

A copy and a hand-over alternate, so that other work on the machine disturbs both alike; medians.
"inside requests" is how engines on other hosts get weights with sync=tensor (two tensors of them).
"""

from __future__ import annotations

import argparse
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from megatron_gpc.cli import Parser, exit_code
from megatron_gpc.commands.arguments import number
from megatron_gpc.config.file import load
from megatron_gpc.engines.fleet import Fleet
from megatron_gpc.engines.starter import Starter
from megatron_gpc.engines.weight_sync import DiskSync, TensorSync, WeightSync
from megatron_gpc.errors import UserError

VOCAB = 32_000


def make_model(folder: Path, layers: int, hidden: int) -> Qwen2ForCausalLM:
    """With heads of 64, and a tokenizer that nobody will ask for text."""
    heads = hidden // 64
    config = Qwen2Config(
        vocab_size=VOCAB,
        hidden_size=hidden,
        intermediate_size=hidden * 8 // 3 // 64 * 64,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads // 4,
        max_position_embeddings=1024,
        eos_token_id=1,
        bos_token_id=None,
    )
    model = Qwen2ForCausalLM(config)
    model.save_pretrained(folder)
    words = Tokenizer(models.WordLevel({"a": 0, "$": 1}, "a"))
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="$").save_pretrained(folder)
    return model


def seconds(work: Callable[[], object]) -> float:
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


def measure(
    fleet: Fleet, folder: Path, bucket_bytes: int, model: Qwen2ForCausalLM, rounds: int
) -> dict[str, tuple[float, ...]]:
    """Bytes a second of a hand-over, and of copies at the same time, by the way it goes."""
    named = [(name, tensor.detach()) for name, tensor in model.named_parameters()]
    size = sum(tensor.nbytes for _, tensor in named)
    copies = [torch.empty_like(tensor).copy_(tensor) for _, tensor in named]

    def copy() -> None:
        for to, (_, tensor) in zip(copies, named, strict=True):
            to.copy_(tensor)

    def push(sync: WeightSync) -> None:
        sync.push(named, f"{time.time_ns()}")
        states = [engine.state for engine in fleet.engines]
        assert set(states) == {"ready"}, [engine.problem for engine in fleet.engines]

    found = {}
    ways = {"disk": DiskSync(fleet, folder), "tensor": TensorSync(fleet, bucket_bytes)}
    for name, sync in ways.items():
        seconds(lambda sync=sync: push(sync))
        both = [(seconds(lambda sync=sync: push(sync)), seconds(copy)) for _ in range(rounds)]
        found[name] = tuple(size / statistics.median(taken) for taken in zip(*both, strict=True))
    for engine in fleet.engines:
        engine.reads = "requests"
    del named[2:]
    handed = sum(tensor.nbytes for _, tensor in named) / seconds(lambda: push(ways["tensor"]))
    found["tensor, inside requests"] = handed, found["tensor"][1]
    ways["tensor"].close()
    return found


def main() -> int:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=number(int, 1), default=24)
    parser.add_argument("--hidden", type=number(int, 1), default=1024, help="a multiple of 256")
    parser.add_argument("--rounds", type=number(int, 1), default=5)
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE")
    arguments = parser.parse_intermixed_args()
    if arguments.hidden % 256:
        raise UserError(f"--hidden: expected a multiple of 256, got {arguments.hidden}")
    torch.set_num_threads(1)
    table = Table(title="hand-over of weights")
    for heading in ("engines", "sync", "GB/s", "a copy's", "share"):
        table.add_column(heading, justify="left" if heading in ("engines", "sync") else "right")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "config.yaml").write_text(
            f"run_dir: {folder}/run\nmodel: {{hf: {folder}}}\n"
            "data: {prompts: none, verifier: addition}\n"
        )
        kinds = ["embedded"]
        if any(given.startswith("sglang.") for given in arguments.overrides):
            kinds.append("sglang")
        asked = [*arguments.overrides, "rollout.server.sync=tensor"]
        configs = {
            kind: load(folder / "config.yaml", [*asked, f"rollout.server.kind={kind}"])
            for kind in kinds
        }
        model = make_model(folder, arguments.layers, arguments.hidden)
        size = sum(tensor.nbytes for tensor in model.parameters())
        for kind, config in configs.items():
            server = config.rollout.server
            with Fleet(Starter(server, config.sglang, folder, folder / kind)) as fleet:
                fleet.await_started()
                bucket_bytes = server.bucket_mb * 2**20
                found = measure(fleet, folder, bucket_bytes, model, arguments.rounds)
            for way, (handed, copied) in found.items():
                rates = (f"{rate / 1e9:.2f}" for rate in (handed, copied))
                table.add_row(f"{server.engines} {kind}", way, *rates, f"{handed / copied:.0%}")
    console = Console(width=100)
    console.print(table)
    console.print(f"{size / 2**20:.0f} MiB; {platform.machine()} CPU; torch {torch.__version__}")
    return 0


if __name__ == "__main__":
    sys.exit(exit_code(main))
