"""Log-prob + entropy at Qwen's vocabulary: the chunked kernel against full logits, in one run.

    python tools/bench/token_stats.py [--tokens 256 1024] [--vocab 151936] [--chunk 1024]

On a CPU the kernel takes smaller chunks where those fit the cache.  Each way runs in a process of
its own, forward and backward with a gradient through both log-prob and entropy, on the same bf16
logits.  Peak memory is what it took beside the logits and their gradient, which every way must
make.  What counts are the ratios of one run.
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import subprocess
import sys
import time

import torch
from rich.console import Console
from rich.table import Table

from megatron_gpc.cli import Parser, exit_code
from megatron_gpc.commands.arguments import number
from megatron_gpc.kernels.vocab_parallel import token_stats


def full(logits_TV: torch.Tensor, targets_T: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The textbook: fp32 log-softmax over the whole vocabulary."""
    logp_TV = logits_TV.float().log_softmax(-1)
    entropy_T = -(logp_TV.exp() * logp_TV).sum(-1)
    return logp_TV.gather(1, targets_T[:, None])[:, 0], entropy_T


def chunked(
    logits_TV: torch.Tensor, targets_T: torch.Tensor, chunk: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The project's kernel."""
    stats = token_stats(
        logits_TV, targets_T, vocab_size=logits_TV.shape[1], chunk_tokens=chunk, entropy_grad=True
    )
    return stats.logp_T, stats.entropy_T


def peak_bytes() -> int:
    """Most memory that this process (on CUDA: this device) has used so far."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def measure(way: str, tokens: int, vocab: int, chunk: int) -> dict[str, float]:
    """One way's figures: peak bytes beside logits and gradient, seconds of the fastest pass."""
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    logits_TV = torch.empty(tokens, vocab, dtype=torch.bfloat16, device=device)
    for row in logits_TV:  # row by row, or making them would be the peak
        row.normal_(std=2.0)
    logits_TV.requires_grad_()
    targets_T = torch.randint(0, vocab, (tokens,), device=device)
    before = peak_bytes()
    seconds = []
    for _ in range(3):
        logits_TV.grad = None
        begin = time.perf_counter()
        if way == "full":
            logp_T, entropy_T = full(logits_TV, targets_T)
        else:
            logp_T, entropy_T = chunked(logits_TV, targets_T, chunk)
        (logp_T.sum() + 0.1 * entropy_T.sum()).backward()
        if device == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - begin)
    return {
        "bytes": peak_bytes() - before - logits_TV.nbytes,
        "seconds": min(seconds),
        "entropy": entropy_T.mean().item(),
    }


def in_own_process(way: str, tokens: int, vocab: int, chunk: int) -> dict[str, float]:
    """`measure` in a process in which nothing else has raised the peak."""
    sizes = ("--tokens", str(tokens), "--vocab", str(vocab), "--chunk", str(chunk))
    done = subprocess.run(
        [sys.executable, __file__, "--way", way, *sizes],
        stdout=subprocess.PIPE,
        check=True,
        timeout=1200,
    )
    return json.loads(done.stdout)


def main() -> int:
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=number(int, 1), nargs="+", default=[256, 1024])
    parser.add_argument("--vocab", type=number(int, 1), default=151_936)
    parser.add_argument("--chunk", type=number(int, 1), default=1024, help="most tokens of a chunk")
    parser.add_argument("--way", choices=["full", "chunked"], help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.way:
        (tokens,) = arguments.tokens
        print(json.dumps(measure(arguments.way, tokens, arguments.vocab, arguments.chunk)))
        return 0
    table = Table(
        title=f"log-prob + entropy, forward and backward, V = {arguments.vocab:,}, "
        f"chunks of at most {arguments.chunk} tokens"
    )
    for heading in ("T", "", "full logits", "chunked", "full / chunked"):
        table.add_column(heading, justify="right" if heading else "left")
    for tokens in arguments.tokens:
        ways = {
            way: in_own_process(way, tokens, arguments.vocab, arguments.chunk)
            for way in ("full", "chunked")
        }
        error = abs(ways["full"]["entropy"] - ways["chunked"]["entropy"])
        assert error < 1e-4, f"mean entropies differ by {error}"
        for name, what, scale in (
            ("bytes", "MiB beside logits and gradient", 2**20),
            ("seconds", "seconds a pass", 1.0),
        ):
            one, other = ways["full"][name] / scale, ways["chunked"][name] / scale
            table.add_row(str(tokens), what, f"{one:.2f}", f"{other:.2f}", f"{one / other:.2f}")
    Console(width=100).print(table)
    where = f"{platform.machine()} CPU, {torch.get_num_threads()} threads"
    if torch.cuda.is_available():
        where = torch.cuda.get_device_name()
    print(f"{where}; torch {torch.__version__}")
    return 0


if __name__ == "__main__":
    sys.exit(exit_code(main))
