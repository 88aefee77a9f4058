"""Make the example's starting point: a tiny Qwen2 that writes digits at random, and its prompts.

    python build.py OUT

The task: given `47=`, write 16 digits that end in 4 and whose sum is odd, as 7 is.  The ending can
be learned.  Whether 16 digits add up to an even or an odd number is luck to a policy of this size.

OUT becomes a Hugging Face checkpoint folder with

    model.safetensors, config.json   Qwen2, 2 layers, hidden 32, after a supervised warm-up
    tokenizer.json                   12 tokens: ten digits, `=`, and `$`, which ends a text
    train.jsonl, heldout.jsonl       prompts; ten of the hundred are held out

The warm-up teaches a distribution: every digit is drawn with P ~ SKEW^rank, where the favourite
depends on the prompt and the place, and the last one is right half of the time besides.  So likely
and unlikely tokens exist, which is what thresholds by probability tell apart.  It learns from the
probabilities themselves, not from samples of them, and is done in a fraction of the updates; it has
to converge, because a policy that has not goes on losing entropy by itself.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path

# Threads that wait for each other by spinning take a busy machine's cores from those they wait for.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # read when torch is imported

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch.nn.functional import cross_entropy, one_hot
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

DIGITS = 16
SKEW = 0.3
UPDATES = 600
BATCH = 64
LEARNING_RATE = 3e-3
EQUALS, END = 10, 11


def digit_tokenizer() -> PreTrainedTokenizerFast:
    """One token a character."""
    vocabulary = {char: i for i, char in enumerate("0123456789=$")}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="$")


def distributions(prompts: torch.Tensor) -> torch.Tensor:
    """What the policy learns to draw from: prompts [B, 2] -> probabilities [B, DIGITS, 12]."""
    wanted = prompts[:, :1]
    favourites = wanted + torch.arange(DIGITS)
    by_rank = SKEW ** torch.arange(10.0)
    ranked = (3 * torch.arange(10) + favourites[..., None]) % 10  # [B, DIGITS, rank] -> digit
    chances = torch.zeros(len(prompts), DIGITS, END + 1)
    chances.scatter_(-1, ranked, (by_rank / by_rank.sum()).expand(ranked.shape).contiguous())
    ending = one_hot(wanted[:, 0], END + 1)
    chances[:, -1] = (chances[:, -1] + ending) / 2
    return chances


def teach(model: Qwen2ForCausalLM, prompts: torch.Tensor, draw: torch.Generator) -> None:
    optimizer = torch.optim.Adam(model.parameters(), betas=(0.9, 0.98))
    for update in range(UPDATES):
        rate = LEARNING_RATE * min(1.0, (update + 1) / 50)
        for group in optimizer.param_groups:
            group["lr"] = rate if update < 0.7 * UPDATES else 0.3 * rate
        chosen = prompts[torch.randint(len(prompts), (BATCH,), generator=draw)]
        chances = distributions(chosen)
        answers = torch.multinomial(chances.flatten(0, 1), 1, generator=draw).view(BATCH, DIGITS)
        text = torch.cat([chosen, torch.full((BATCH, 1), EQUALS), answers], dim=1)
        logits = model(text[:, :-1]).logits[:, 2:]
        loss = cross_entropy(logits.flatten(0, 1), chances.flatten(0, 1))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    out = parser.parse_args().out

    torch.manual_seed(0)
    torch.set_num_threads(1)
    draw = torch.Generator().manual_seed(0)
    every = torch.cartesian_prod(torch.arange(10), torch.arange(10))
    held_out, train = every[torch.randperm(100, generator=draw)].split([10, 90])
    tokenizer = digit_tokenizer()
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
    teach(model, train, draw)
    print(f"warm-up: {UPDATES} updates in {time.monotonic() - begin:.0f} s", file=sys.stderr)

    part = out.with_name(out.name + ".part")  # whole or absent
    part.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(part)
    tokenizer.save_pretrained(part)
    for name, chosen in (("train", train), ("heldout", held_out)):
        rows = [{"prompt": f"{a}{b}=", "label": [a, b]} for a, b in sorted(chosen.tolist())]
        (part / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    part.rename(out)


if __name__ == "__main__":
    main()
