"""The same prompts through transformers and through Megatron, in float32.

The checkpoint is a converted one, or one that training saved.  Starts tp * pp * ep processes.  Exit
codes: 0 the same; 1 the largest difference of log-probabilities is beyond the tolerance; 2 the
input cannot be used; 3 a process failed.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from megatron_gpc.commands.arguments import number
from megatron_gpc.config import Config, DataConfig, ModelConfig, ParallelConfig
from megatron_gpc.config.file import dump, load
from megatron_gpc.config.layout import check_layout, world_size
from megatron_gpc.errors import UserError
from megatron_gpc.rollout.tokenizer import load_tokenizer
from megatron_gpc.run.launch import run_ranks
from megatron_gpc.run.placement import Share
from megatron_gpc.weights import HFReader, family_of, places_of
from megatron_gpc.weights.folders import read_hf_config
from megatron_gpc.weights.megatron_files import MegatronReader

TEXTS = (
    "The sum of the first ten odd numbers is 100, because",
    "Let $f(x) = x^2 - 4x + 3$. The roots of $f$ are $x = 1$ and $x = 3$, so",
    "def is_prime(n: int) -> bool:\n    if n < 2:\n        return False\n    for d in range(2,",
    "床前明月光，疑是地上霜。举头望明月，低头思故乡。",
)
RANDOM_SEQUENCES, RANDOM_LENGTH = 4, 32
MOST_DIFFERENCE = 1e-3
"""On log-probabilities in float32: rounding stays below it in deep models too; a wrong weight,
rotary base or norm exceeds it by orders of magnitude."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--hf", type=Path, required=True, help="Hugging Face folder")
    parser.add_argument("--checkpoint", type=Path, required=True, help="distributed checkpoint")
    for name, meaning in (("tp", "tensor"), ("pp", "pipeline"), ("ep", "expert")):
        parser.add_argument(
            f"--{name}", type=number(int, 1, 1024), default=1, help=f"{meaning} parallelism"
        )
    parser.add_argument(
        "--tolerance",
        type=number(float, 0),
        default=MOST_DIFFERENCE,
        help="largest difference (%(default)s)",
    )


def run(arguments: argparse.Namespace) -> int:
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # what it has made is removed
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


@dataclass(frozen=True)
class Parity:
    """Megatron against transformers, over every position of every prompt and every token."""

    largest: float
    """Largest absolute difference of log-probabilities."""
    mean: float
    """Mean absolute difference of log-probabilities."""
    agreement: float
    """Share of positions at which both find the same token the most probable."""
    positions: int


class RanksFailed(RuntimeError):
    """A process ended with an error, which it has printed; with its exit code."""


def measure(
    hf: Path, checkpoint: Path, parallel: ParallelConfig, sequences: Sequence[Sequence[int]]
) -> Parity:
    """Run both and compare.

    Args:
        hf: Hugging Face folder, weights included.
        checkpoint: a converted checkpoint, or one that training saved.
        sequences: token ids of the prompts.

    Raises:
        UserError: either is damaged, or the layout does not suit the model.
        RanksFailed: a process ended with an error.
    """
    hf_config = read_hf_config(hf)
    family = family_of(hf_config)
    params, fields = family.params(hf_config, parallel.tp), family.model_fields(hf_config)
    HFReader(hf).check(params, family.copies(hf_config))
    MegatronReader(checkpoint).check(places_of(params, fields))
    with tempfile.TemporaryDirectory(prefix="parity-") as name:
        work = Path(name)
        config = Config(
            run_dir=work,
            model=ModelConfig(hf=hf.absolute()),
            data=DataConfig(prompts=work, verifier="math"),
            parallel=parallel,
        )
        check_layout(config, hf_config, torch.cuda.is_available())
        (work / "config.yaml").write_text(dump(config))
        logits = transformers_logits(hf, sequences)
        torch.save({"sequences": sequences, "logits": logits}, work / "reference.pt")
        del logits
        code = run_ranks(
            [str(work), str(checkpoint.absolute())],
            Share.alone(world_size(parallel)),
            work,
            module="megatron_gpc.commands.parity",
        )
        if code:
            raise RanksFailed(code)
        return Parity(**json.loads((work / "parity.json").read_text()))


def prompts(hf: Path) -> list[list[int]]:
    """Token ids of TEXTS; of random tokens if the folder has no tokenizer.

    Raises:
        UserError: the tokenizer cannot be loaded.
    """
    if not any((hf / name).is_file() for name in ("tokenizer.json", "vocab.json")):
        vocab = family_of(read_hf_config(hf)).model_fields(read_hf_config(hf)).vocab_size
        draw = torch.Generator().manual_seed(0)
        shape = (RANDOM_SEQUENCES, RANDOM_LENGTH)
        return torch.randint(vocab, shape, generator=draw).tolist()
    tokenizer = load_tokenizer(hf)
    return [ids for text in TEXTS if (ids := tokenizer(text)["input_ids"])]


@torch.no_grad()
def transformers_logits(hf: Path, sequences: Sequence[Sequence[int]]) -> list[torch.Tensor]:
    """Logits [S, V] of every sequence."""
    from transformers import AutoModelForCausalLM
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(hf, dtype=torch.float32, local_files_only=True)
    return [model(torch.tensor([sequence])).logits[0] for sequence in sequences]


def compare(ours: Sequence[torch.Tensor], theirs: Sequence[torch.Tensor]) -> Parity:
    """Differences of log-probabilities of two sets of logits [S, V]."""
    largest, total, count, same, positions = [], 0.0, 0, 0, 0
    for our_SV, their_SV in zip(ours, theirs, strict=True):
        difference_SV = (our_SV.log_softmax(-1) - their_SV.log_softmax(-1)).abs()
        largest.append(difference_SV.max())
        total += difference_SV.double().sum().item()
        count += difference_SV.numel()
        same += int((our_SV.argmax(-1) == their_SV.argmax(-1)).sum())
        positions += len(our_SV)
    return Parity(torch.stack(largest).max().item(), total / count, same / positions, positions)


def _rank(work: Path, checkpoint: Path) -> None:
    """One process of the layout; the one that has the logits writes the result."""
    from megatron_gpc.mcore import cpu

    cpu.install()  # before the first megatron import
    from megatron_gpc.mcore.checkpoint.state import load_weights
    from megatron_gpc.mcore.logits import sequence_logits
    from megatron_gpc.mcore.model import build_model
    from megatron_gpc.mcore.setup import process_groups

    config = load(work / "config.yaml")
    reference = torch.load(work / "reference.pt", mmap=True)
    with process_groups(config):
        hf_config = read_hf_config(config.model.hf)
        family = family_of(hf_config)
        fields = family.model_fields(hf_config)
        models = build_model(config, fields)
        load_weights(
            checkpoint, models, places_of(family.params(hf_config, config.parallel.tp), fields)
        )
        logits = sequence_logits(config, models, reference["sequences"])
        if logits is not None:
            result = asdict(compare(logits, reference["logits"]))
            (work / "parity.json").write_text(json.dumps(result))


if __name__ == "__main__":
    try:
        _rank(Path(sys.argv[1]), Path(sys.argv[2]))
    except UserError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
