"""Make the example's starting point: a tiny Qwen2 that has learned the format, and its prompts.

    python build.py OUT [--peaked] [--seed 0]

The task: given N in 100..999 as `NNN=`, write `a+b$` with a + b = N.  N - 1 answers are right, so
there is room for entropy.  OUT becomes a Hugging Face checkpoint folder with

    model.safetensors, config.json   Qwen2, 4 layers, hidden 64, after a supervised warm-up
    tokenizer.json                   one token a byte; `$` ends an answer
    train.jsonl, heldout.jsonl       prompts; one N in ten is held out and never trained on

The warm-up stops once sampled answers are right TARGET of the time.  Its answers are skewed: the
digits of a are drawn with P(d) ~ skew^d, so that likely and unlikely tokens exist from the start;
that is what thresholds by probability can tell apart.  They have a fixed length (a has 3 digits, 2
for N < 200): when short answers were taught too, the policy soon wrote nothing else, since they
are easier, and entropy fell for that reason and no other.

With --peaked the warm-up is in two stages, as language models are trained: a broad one (uniform
digits), then a short one on strongly skewed answers.  The policy is then right some 80 % of the
time and has clear favourites, but is about as good at the answers that it rarely gives: entropy
that falls from there does not fall because the favourites are easier.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
import time
from pathlib import Path

# Threads that wait for each other by spinning take a busy machine's cores from those they wait for.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # read when torch is imported

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from megatron_gpc.rewards.addition import verify

SKEW = 0.8
TARGET = 0.40
LEAST = 0.30
BROAD_TARGET = 0.50
PEAKED_SKEW = 0.35
PEAKED_UPDATES = 100
BATCH = 256
LEARNING_RATE = 3e-3
MAX_UPDATES = 4000
CHECK_EVERY = 25
ANSWER_TOKENS = 8


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """256 tokens, one a byte, in the order of GPT-2's byte alphabet."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="$")


def skewed_answer(n: int, skew: float, draw: random.Random) -> str:
    """A right answer for n; the digits of a follow P(d) ~ skew^d."""
    weights = [skew**d for d in range(10)]
    length = 3 if n >= 200 else 2
    while True:
        a = int("".join(draw.choices("0123456789", weights, k=length)))
        if 0 < a < n and len(str(a)) == length:
            return f"{a}+{n - a}$"


def right_rate(
    model: Qwen2ForCausalLM, tokenizer: PreTrainedTokenizerFast, numbers: list[int]
) -> float:
    """Share of right answers, sampled at temperature 1, one for each number."""
    prompts = torch.tensor([tokenizer(f"{n}=")["input_ids"] for n in numbers])
    answers = model.generate(
        prompts,
        attention_mask=torch.ones_like(prompts),
        do_sample=True,
        top_k=0,
        max_new_tokens=ANSWER_TOKENS,
        pad_token_id=tokenizer.eos_token_id,
    )[:, prompts.shape[1] :]
    right = 0.0
    for n, row in zip(numbers, answers.tolist(), strict=True):
        text = tokenizer.decode(row)
        right += verify(text[: text.find("$") + 1], n)
    return right / len(numbers)


def teach(
    model: Qwen2ForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    numbers: list[int],
    draw: random.Random,
    *,
    skew: float,
    learning_rate: float,
    updates: int,
    target: float = 1.0,
) -> None:
    """Supervised updates on skewed answers, until `target` of sampled ones are right."""
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.98))
    for update in range(1, updates + 1):
        rows = []
        for n in draw.choices(numbers, k=BATCH):
            rows.append(tokenizer(f"{n}={skewed_answer(n, skew, draw)}")["input_ids"])
        length = max(map(len, rows))
        end = tokenizer.eos_token_id
        tokens = torch.tensor([row + [end] * (length - len(row)) for row in rows])
        labels = torch.tensor([[-100] * 4 + row[4:] + [-100] * (length - len(row)) for row in rows])
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * min(1.0, update / 100)
        loss = model(tokens, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if update % CHECK_EVERY == 0:
            rate = right_rate(model, tokenizer, draw.choices(numbers, k=512))
            print(
                f"\rwarm-up: update {update}, loss {loss.item():.3f}, right {rate:.0%} ",
                end="",
                file=sys.stderr,
                flush=True,
            )
            if rate >= target:
                break
    print(file=sys.stderr)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--peaked", action="store_true", help="right, and with favourites")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()

    torch.manual_seed(arguments.seed)
    numbers = list(range(100, 1000))
    random.Random(arguments.seed).shuffle(numbers)
    held_out, train = numbers[:90], numbers[90:]
    tokenizer = byte_tokenizer()
    model = Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=256,
            hidden_size=64,
            intermediate_size=192,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=64,
            tie_word_embeddings=False,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
        )
    )
    begin = time.monotonic()
    draw = random.Random(arguments.seed)
    skew, target = (1.0, BROAD_TARGET) if arguments.peaked else (SKEW, TARGET)
    teach(
        *(model, tokenizer, train, draw),
        skew=skew,
        learning_rate=LEARNING_RATE,
        updates=MAX_UPDATES,
        target=target,
    )
    if arguments.peaked:
        teach(
            *(model, tokenizer, train, draw),
            skew=PEAKED_SKEW,
            learning_rate=0.3 * LEARNING_RATE,
            updates=PEAKED_UPDATES,
        )
    rate = right_rate(model, tokenizer, train)
    print(
        f"warm-up: {rate:.0%} right after {time.monotonic() - begin:.0f} s",
        file=sys.stderr,
    )
    if rate < LEAST:
        raise SystemExit(f"only {rate:.0%} right: too few for reinforcement learning to start from")

    part = arguments.out.with_name(arguments.out.name + ".part")  # whole or absent
    part.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(part)
    tokenizer.save_pretrained(part)
    for name, chosen in (("train", train), ("heldout", held_out)):
        lines = [json.dumps({"prompt": f"{n}=", "label": n}) for n in chosen]
        (part / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    part.rename(arguments.out)


if __name__ == "__main__":
    main()
