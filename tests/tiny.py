"""A tiny random Qwen2 checkpoint and a rollout to train it on."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from megatron_gpc.algo.advantages import group_advantages
from megatron_gpc.batching import pack, token_streams
from megatron_gpc.config import Config
from megatron_gpc.config.file import load
from megatron_gpc.types import Prompt, RolloutBatch, Sample, TokenStreams
from megatron_gpc.weights import family_of
from megatron_gpc.weights.hf_files import SINGLE

VOCAB = 100  # no multiple of 128: rows of padding exist at every tp


def tiny_qwen2(folder: Path, seed: int = 0, **settings: Any) -> Path:
    """4 layers, hidden 32, 4 heads of which 2 key-value, random weights larger than usual."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(seed)
    model = Qwen2ForCausalLM(
        Qwen2Config(
            **{
                "vocab_size": VOCAB,
                "hidden_size": 32,
                "intermediate_size": 64,
                "num_hidden_layers": 4,
                "num_attention_heads": 4,
                "num_key_value_heads": 2,
                "max_position_embeddings": 64,
                "tie_word_embeddings": False,
                "initializer_range": 0.2,
                "bos_token_id": None,
                "eos_token_id": 1,
                **settings,
            }
        )
    )
    model.save_pretrained(folder)
    return folder


def byte_tokenizer(folder: Path, *further: str, eos_token: str = "$", **added: Any) -> Path:
    """One token a byte, numbered 0 to 255 in the order of their characters, then `further` ones."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokens = (*sorted(pre_tokenizers.ByteLevel.alphabet()), *further)
    vocabulary = {token: i for i, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    made = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=eos_token, **added)
    made.save_pretrained(folder)
    return folder


def hollow_weights(folder: Path) -> Path:
    """The weights that the folder's config.json asks for, all zero, in a file that takes no room on
    the disk, however large the model is."""
    hf = json.loads((folder / "config.json").read_text())
    header, end = {}, 0
    for param in family_of(hf).params(hf):
        for name, shape in zip(param.hf, param.hf_shapes, strict=True):
            begin, end = end, end + 2 * math.prod(shape)
            header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    with (folder / SINGLE).open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    return folder


def run_config(folder: Path, hf: Path, *overrides: str) -> Config:
    """A configuration for one update over everything, unless overrides say otherwise."""
    file = folder / "config.yaml"
    file.write_text(
        f"run_dir: {folder}/run\nmodel: {{hf: {hf}}}\n"
        f"data: {{prompts: {folder}/prompts.jsonl, verifier: addition}}\n"
        "rollout: {prompts_per_step: 4, group_size: 4, max_response_tokens: 8}\n"
        "train: {steps: 10, mini_batches: 1, epochs: 1, micro_batch_size: 4}\n"
        "optim: {lr: 1.0e-3}\n"
        "timeout_s: 120\n"
    )
    return load(file, overrides)


def random_batch(
    prompts: int = 4, group: int = 4, seed: int = 0, responses: Sequence[int] | None = None
) -> RolloutBatch:
    """Prompts of 2-5 random tokens, rewards 0 or 1; responses as long as given, else of 1-8."""
    draw = torch.Generator().manual_seed(seed)

    def tokens(low: int, high: int) -> tuple[int, ...]:
        count = int(torch.randint(low, high + 1, (), generator=draw))
        return tuple(torch.randint(2, VOCAB, (count,), generator=draw).tolist())

    samples = []
    for p in range(prompts):
        prompt = Prompt(p, "", tokens(2, 5), None)
        for i in range(group):
            length = responses[p * group + i] if responses else None
            response = tokens(length or 1, length or 8)
            logprobs = tuple((-3.0 - torch.rand(len(response), generator=draw)).tolist())
            reward = float(torch.randint(0, 2, (), generator=draw))
            spans = (("0", 0, len(response)),)
            samples.append(Sample(prompt, i, response, logprobs, "", "stop", spans, reward))
    rewards_N = torch.tensor([s.reward for s in samples])
    return pack(samples, group_advantages(rewards_N, torch.arange(len(samples)) // group, "std"))


def plain_streams(batch: RolloutBatch) -> TokenStreams:
    """Old log-probs are the server's, and every token's importance weight is 1."""
    return token_streams(batch, batch.rollout_logp_T, torch.ones_like(batch.rollout_logp_T))
