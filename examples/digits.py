"""Starts that write digits at random: what the examples on strings of digits share.

`make_start` trains a tiny Qwen2 on a distribution of answers and writes a Hugging Face folder:

    model.safetensors, config.json   Qwen2, 2 layers, hidden 32, after a supervised warm-up
    tokenizer.json                   12 tokens: ten digits, `=`, and `$`, which ends a text
    train.jsonl, heldout.jsonl       prompts, `47=` with the label [4, 7]

The warm-up teaches likely and unlikely tokens, which is what thresholds by probability tell apart.
It learns from the probabilities themselves, not from samples of them, and is done in a fraction of
the updates; it has to converge, because a policy that has not goes on losing entropy by itself.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

# Threads that wait for each other by spinning take a busy machine's cores from those they wait for.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # read when torch is imported

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch.nn.functional import cross_entropy
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from megatron_gpc.cli import Parser, exit_code
from megatron_gpc.weights.folders import new_folder

DIGITS = 16
"""Of an answer."""
SKEW = 0.3
UPDATES = 600
BATCH = 64
LEARNING_RATE = 3e-3
EQUALS, END = 10, 11

Distribution = Callable[[torch.Tensor], torch.Tensor]
"""Prompts' digits [B, P] -> what the policy learns to draw from, [B, DIGITS, END + 1]."""


def ranked_digits(prompts: torch.Tensor) -> torch.Tensor:
    """Every digit is drawn with P ~ SKEW^rank; the favourite depends on the prompt's first digit
    and the place."""
    favourites = prompts[:, :1] + torch.arange(DIGITS)
    by_rank = SKEW ** torch.arange(10.0)
    ranked = (3 * torch.arange(10) + favourites[..., None]) % 10  # [B, DIGITS, rank] -> digit
    chances = torch.zeros(len(prompts), DIGITS, END + 1)
    return chances.scatter_(-1, ranked, (by_rank / by_rank.sum()).expand(ranked.shape).contiguous())


def make_start(
    description: str,
    digits: int,
    held_out: int,
    distribution: Distribution,
    evaluated: Callable[[torch.Tensor], Mapping[str, torch.Tensor]] = lambda prompts: {
        "heldout": prompts
    },
) -> int:
    """Be the script that makes a start: teach a policy the distribution, write it and its prompts;
    returns the exit code.

    Args:
        description: of the script, whose argument is the folder; that appears whole or not at all.
        digits: of a prompt.
        held_out: how many of all prompts are not trained on.
        evaluated: the files of prompts that are made of those, by name.
    """

    def work() -> int:
        parser = Parser(description=description.splitlines()[0])
        parser.add_argument("out", type=Path)
        with new_folder(parser.parse_args().out) as out:
            _write_start(out, digits, held_out, distribution, evaluated)
        return 0

    return exit_code(work)


def _write_start(
    out: Path,
    digits: int,
    held_out: int,
    distribution: Distribution,
    evaluated: Callable[[torch.Tensor], Mapping[str, torch.Tensor]],
) -> None:
    torch.manual_seed(0)
    draw = torch.Generator().manual_seed(0)
    every = torch.cartesian_prod(*[torch.arange(10)] * digits)
    sizes = [held_out, len(every) - held_out]
    rest, train = every[torch.randperm(len(every), generator=draw)].split(sizes)
    torch.set_num_threads(1)
    model = Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=END + 1,
            hidden_size=32,
            intermediate_size=96,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=32,
            tie_word_embeddings=False,
            bos_token_id=None,
            eos_token_id=END,
            rope_theta=100.0,
        )
    )
    begin = time.monotonic()
    _teach(model, train, distribution, draw)
    print(f"warm-up: {UPDATES} updates in {time.monotonic() - begin:.0f} s", file=sys.stderr)

    model.save_pretrained(out)
    _digit_tokenizer().save_pretrained(out)
    for name, prompts in {"train": train, **evaluated(rest)}.items():
        rows = [
            {"prompt": "".join(map(str, prompt)) + "=", "label": prompt}
            for prompt in sorted(prompts.tolist())
        ]
        (out / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def _digit_tokenizer() -> PreTrainedTokenizerFast:
    """One token a character."""
    vocabulary = {char: i for i, char in enumerate("0123456789=$")}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="$")


def _teach(
    model: Qwen2ForCausalLM,
    prompts: torch.Tensor,
    distribution: Distribution,
    draw: torch.Generator,
) -> None:
    optimizer = torch.optim.Adam(model.parameters(), betas=(0.9, 0.98))
    for update in range(UPDATES):
        rate = LEARNING_RATE * min(1.0, (update + 1) / 50)
        for group in optimizer.param_groups:
            group["lr"] = rate if update < 0.7 * UPDATES else 0.3 * rate
        chosen = prompts[torch.randint(len(prompts), (BATCH,), generator=draw)]
        chances = distribution(chosen)
        answers = torch.multinomial(chances.flatten(0, 1), 1, generator=draw).view(BATCH, DIGITS)
        text = torch.cat([chosen, torch.full((BATCH, 1), EQUALS), answers], dim=1)
        logits = model(text[:, :-1]).logits[:, prompts.shape[1] :]
        loss = cross_entropy(logits.flatten(0, 1), chances.flatten(0, 1))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
