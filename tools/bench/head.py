"""LM head + log-prob + entropy, from hidden states to gradients: the project's ways and others'.

    python tools/bench/head.py [--tokens 1024] [--hidden 896] [--vocab 151936] [--dtype bfloat16]
                               [--ways naive fused ...] [--json]

Each way runs in a process of its own, with a gradient through both log-prob and entropy, and is
held to the first one's numbers.  `matmuls` are the bare products that have to be made: logits,
twice where they are not kept, and the gradients of hidden states and head.  What counts are the
ratios of one run.

seconds_forward, seconds_both: the fastest of two passes (of eight on a GPU), on a CPU in seconds of
its cores, which do not depend on what else they do; extra_bytes: what a pass takes at most beside
hidden states, head and their gradients.  Liger's and verl's kernels run where there is a GPU and
they are installed.
"""

from __future__ import annotations

import argparse
import json
import platform
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch.utils.checkpoint import checkpoint

from megatron_gpc.cli import Parser, exit_code
from megatron_gpc.commands.arguments import number
from megatron_gpc.kernels import chunk_vocab
from megatron_gpc.kernels.head import head_stats
from megatron_gpc.kernels.vocab_parallel import token_stats

CUDA = torch.cuda.is_available()
ROUNDS = 8 if CUDA else 2
TOKENS = 1024
"""Of a part that `checkpointed` takes at a time."""
COMPARED = ("logp", "entropy", "hidden_grad", "weight_grad")
TOLERANCE = 0.02
"""Relative difference of a way's numbers from the first's."""

Stats = tuple[torch.Tensor, torch.Tensor]
"""Log-prob and entropy of every token."""


def naive(hidden_TD: torch.Tensor, weight_VD: torch.Tensor, targets_T: torch.Tensor) -> Stats:
    """The textbook: all logits, and fp32 log-softmax over the whole vocabulary."""
    logp_TV = (hidden_TD @ weight_VD.T).float().log_softmax(-1)
    entropy_T = -(logp_TV.exp() * logp_TV).sum(-1)
    return logp_TV.gather(1, targets_T[:, None])[:, 0], entropy_T


def checkpointed(
    hidden_TD: torch.Tensor, weight_VD: torch.Tensor, targets_T: torch.Tensor
) -> Stats:
    """The textbook for some tokens at a time, done again on the way back."""
    parts: list[Stats] = []
    for begin in range(0, len(targets_T), TOKENS):
        some = slice(begin, begin + TOKENS)
        given: Any = (hidden_TD[some], weight_VD, targets_T[some])
        made: Any = checkpoint(naive, *given, use_reentrant=False)
        parts.append(made)
    return torch.cat([logp for logp, _ in parts]), torch.cat([entropy for _, entropy in parts])


def logits(hidden_TD: torch.Tensor, weight_VD: torch.Tensor, targets_T: torch.Tensor) -> Stats:
    """train.head=logits."""
    stats = token_stats(
        hidden_TD @ weight_VD.T, targets_T, vocab_size=len(weight_VD), entropy_grad=True
    )
    return stats.logp_T, stats.entropy_T


def fused(
    hidden_TD: torch.Tensor,
    weight_VD: torch.Tensor,
    targets_T: torch.Tensor,
    keep_logits: bool = False,
) -> Stats:
    """train.head=fused."""
    options: dict[str, Any] = {"entropy_grad": True, "keep_logits": keep_logits}
    stats = head_stats(hidden_TD, weight_VD, targets_T, vocab_size=len(weight_VD), **options)
    return stats.logp_T, stats.entropy_T


def kept(hidden_TD: torch.Tensor, weight_VD: torch.Tensor, targets_T: torch.Tensor) -> Stats:
    """train.head=auto, where the logits fit."""
    return fused(hidden_TD, weight_VD, targets_T, keep_logits=True)


def liger(hidden_TD: torch.Tensor, weight_VD: torch.Tensor, targets_T: torch.Tensor) -> Stats:
    """Liger's kernel.  It has the sum of log-probs alone, and no entropy."""
    from liger_kernel.transformers.functional import (  # pyright: ignore[reportMissingImports]
        liger_fused_linear_cross_entropy,
    )

    loss = liger_fused_linear_cross_entropy(hidden_TD, weight_VD, targets_T, reduction="sum")
    return -loss[None] / len(targets_T), torch.empty(0)


def verl(hidden_TD: torch.Tensor, weight_VD: torch.Tensor, targets_T: torch.Tensor) -> Stats:
    """verl's kernel."""
    from verl.utils.kernel.linear_cross_entropy import (  # pyright: ignore[reportMissingImports]
        linear_cross_entropy,
    )

    return linear_cross_entropy(hidden_TD, weight_VD, targets_T, 1.0)


OTHERS = {"liger": "liger_kernel", "verl": "verl"}
"""Ways of other projects, and the modules that they need beside a GPU."""
WAYS: dict[str, Callable[[torch.Tensor, torch.Tensor, torch.Tensor], Stats]] = {
    "naive": naive,
    "compiled": lambda *given: torch.compile(naive)(*given),
    "checkpointed": checkpointed,
    "logits": logits,
    "kept": kept,
    "fused": fused,
    "liger": liger,
    "verl": verl,
}


def measure(way: str, tokens: int, hidden: int, vocab: int, dtype: torch.dtype) -> dict[str, Any]:
    """A way's figures, and what it found."""
    torch.manual_seed(0)
    device = "cuda" if CUDA else "cpu"
    hidden_TD = torch.randn(tokens, hidden, device=device).to(dtype).requires_grad_()
    weight_VD = torch.empty(vocab, hidden, dtype=dtype, device=device)
    for rows in weight_VD.split(1024):  # or making them would be the peak
        rows.normal_(std=2 * hidden**-0.5)
    weight_VD.requires_grad_()
    targets_T = torch.randint(0, vocab, (tokens,), device=device)
    there = reset_peak()
    if way == "matmuls":
        with torch.no_grad():
            passes = [
                products(hidden_TD, weight_VD, chunk)
                for chunk in (chunk_vocab(tokens, device), vocab)
                for _ in range(ROUNDS)
            ]
        forward, both = (min(seconds) for seconds in zip(*passes, strict=True))
    else:
        seconds = []
        for _ in range(ROUNDS):
            hidden_TD.grad = weight_VD.grad = None
            begin = now()
            logp_T, entropy_T = WAYS[way](hidden_TD, weight_VD, targets_T)
            half = now()
            scale = tokens / len(logp_T)  # 1, but for Liger's mean
            # products, whose gradient is a tensor in memory, as verl's kernel wants it
            loss = scale * (logp_T @ torch.ones_like(logp_T))
            if len(entropy_T):
                loss = loss + 0.1 * (entropy_T @ torch.ones_like(entropy_T))
            loss.backward()
            seconds.append((half - begin, now() - begin))
        forward, both = (min(each) for each in zip(*seconds, strict=True))
    gradients = hidden_TD.nbytes + weight_VD.nbytes
    found: dict[str, Any] = {
        "seconds_forward": forward,
        "seconds_both": both,
        "extra_bytes": max(0, peak() - there - gradients),
    }
    if way != "matmuls":
        assert hidden_TD.grad is not None and weight_VD.grad is not None
        found["logp"] = logp_T.double().mean().item()
        if len(entropy_T):  # else gradients are of something else too
            found |= {
                "entropy": entropy_T.double().mean().item(),
                "hidden_grad": hidden_TD.grad.float().norm().item(),
                "weight_grad": weight_VD.grad.float().norm().item(),
            }
    return found


def products(hidden_TD: torch.Tensor, weight_VD: torch.Tensor, chunk: int) -> tuple[float, float]:
    """Seconds of one product, and of all four, a chunk of the vocabulary at a time."""
    tokens = len(hidden_TD)
    buffer = hidden_TD.new_empty(tokens * min(chunk, len(weight_VD)))
    hidden_grad_TD, seconds = torch.empty_like(hidden_TD), [0.0, 0.0]
    weight_grad_VD = torch.empty_like(weight_VD)

    def run(number: int, product: Callable[[], Any]) -> None:
        begin = now()
        product()
        seconds[number] += now() - begin

    for weight_CD, grad_CD in zip(weight_VD.split(chunk), weight_grad_VD.split(chunk), strict=True):
        logits_TC = buffer[: tokens * len(weight_CD)].view(tokens, len(weight_CD))
        run(0, lambda x=logits_TC, w=weight_CD: torch.mm(hidden_TD, w.T, out=x))
        run(1, lambda x=logits_TC, g=grad_CD: torch.mm(x.T, hidden_TD, out=g))
        run(1, lambda x=logits_TC, w=weight_CD: torch.mm(x, w, out=hidden_grad_TD))
    return seconds[0], 2 * seconds[0] + seconds[1]


def now() -> float:
    if not CUDA:
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


def reset_peak() -> int:
    """Bytes that are used now; `peak` counts from here."""
    if CUDA:
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")


def peak() -> int:
    """Most bytes that were used since `reset_peak`."""
    return torch.cuda.max_memory_allocated() if CUDA else _status("VmHWM")


def _status(name: str) -> int:
    found = re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) * 1024


def in_own_process(way: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """`measure` in a process in which nothing else has raised the peak; its error, if it fails."""
    sizes = [f"--{name}={getattr(arguments, name)}" for name in ("tokens", "hidden", "vocab")]
    done = subprocess.run(
        [sys.executable, __file__, *sizes, f"--dtype={arguments.dtype}", "--way", way],
        capture_output=True,
        text=True,
        timeout=1800,
    )
    if done.returncode:
        return {
            "error": (done.stderr.strip().splitlines() or [f"ended with {done.returncode}"])[-1]
        }
    return json.loads(done.stdout)


def disagreements(found: dict[str, dict[str, Any]]) -> Iterator[str]:
    """What two ways say differently."""
    ways = [way for way, result in found.items() if "logp" in result]
    for way in ways[1:]:
        for name in found[ways[0]].keys() & found[way].keys() & set(COMPARED):
            want, got = found[ways[0]][name], found[way][name]
            if not abs(got - want) <= TOLERANCE * abs(want):
                yield f"{name} is {got:.6g} by {way} and {want:.6g} by {ways[0]}"


def main() -> int:
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=number(int, 1), default=1024)
    parser.add_argument("--hidden", type=number(int, 1), default=896)
    parser.add_argument("--vocab", type=number(int, 1), default=151_936)
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    names = ["matmuls", *WAYS]
    absent = [way for way, module in OTHERS.items() if not (CUDA and find_spec(module))]
    there = [name for name in names if name not in absent]
    parser.add_argument("--ways", nargs="+", choices=names, default=there)
    parser.add_argument("--json", action="store_true", help="one object, way by way")
    parser.add_argument("--way", choices=names, help=argparse.SUPPRESS)
    a = parser.parse_args()
    if a.way:
        found = measure(a.way, a.tokens, a.hidden, a.vocab, getattr(torch, a.dtype))
        print(json.dumps(found))
        return 0
    results = {way: in_own_process(way, a) for way in a.ways}
    wrong = list(disagreements(results))
    for way in absent:
        print(f"left out: {way}, which needs a GPU and the module {OTHERS[way]}", file=sys.stderr)
    if a.json:
        print(json.dumps(results, indent=1))
    else:
        where = torch.cuda.get_device_name() if CUDA else f"{platform.machine()} CPU"
        threads = "" if CUDA else f", {torch.get_num_threads()} threads"
        sizes = f"T = {a.tokens:,}, D = {a.hidden:,}, V = {a.vocab:,}, {a.dtype}"
        title = f"{sizes}; {where}{threads}; torch {torch.__version__}"
        table = Table("", "forward [s]", "both [s]", "/ matmuls", "MiB beside", title=title)
        bare = results.get("matmuls", {}).get("seconds_both", float("nan"))
        for way, result in results.items():
            if "error" in result:
                table.add_row(way, result["error"])
                continue
            forward, both, extra = (
                result[name] for name in ("seconds_forward", "seconds_both", "extra_bytes")
            )
            ratio = f"{both / bare:.2f}"
            table.add_row(way, f"{forward:.3f}", f"{both:.3f}", ratio, f"{extra / 2**20:,.0f}")
        Console(width=110).print(table)
    for text in wrong:
        print(text, file=sys.stderr)
    return int(bool(wrong) or any("error" in result for result in results.values()))


if __name__ == "__main__":
    sys.exit(exit_code(main))
