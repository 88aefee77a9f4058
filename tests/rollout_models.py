"""Tiny models, and what transformers itself says of them: the values servers are held to."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from tiny import byte_tokenizer, tiny_qwen2
from transformers import DynamicCache, GenerationConfig, PreTrainedModel

VOCAB = 264
EOS = 257
CONTEXT = 1024


def build_model(folder: Path, seed: int, tied: bool = False) -> Path:
    """A Qwen2 of 2 layers with random weights, and a tokenizer whose tokens are the 256 bytes."""
    tiny_qwen2(
        folder,
        seed,
        vocab_size=VOCAB,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=tied,
        initializer_range=0.3,
        eos_token_id=EOS,
        pad_token_id=256,
    )
    return byte_tokenizer(folder, "<pad>", "<eos>", eos_token="<eos>", pad_token="<pad>")


def logprobs(
    model: PreTrainedModel, prompt: Sequence[int], tokens: Sequence[int], temperature: float = 1.0
) -> torch.Tensor:
    """[len(tokens)] fp32 log-probs of a response, by one forward pass without any cache."""
    with torch.no_grad():
        logits = model(torch.tensor([[*prompt, *tokens]])).logits[0, len(prompt) - 1 : -1].float()
    logp = torch.log_softmax(logits / temperature, dim=-1)
    return logp.gather(-1, torch.tensor(list(tokens))[:, None]).squeeze(-1)


def logprobs_over_old_cache(
    old: PreTrainedModel,
    new: PreTrainedModel,
    prompt: Sequence[int],
    tokens: Sequence[int],
    boundary: int,
) -> torch.Tensor:
    """Log-probs of tokens[boundary:] under `new`, where `old` made the keys and values before.

    The last token that `old` drew has not been through a model yet when the weights change.
    """
    ids = torch.tensor([[*prompt, *tokens]])
    seen = len(prompt) + boundary - 1
    cache = DynamicCache(config=old.config)
    with torch.no_grad():
        old(ids[:, :seen], past_key_values=cache, use_cache=True)
        logits = new(ids[:, seen:-1], past_key_values=cache, use_cache=True).logits[0].float()
    return torch.log_softmax(logits, -1).gather(-1, ids[0, seen + 1 :, None]).squeeze(-1)


def greedy(model: PreTrainedModel, prompt: Sequence[int], count: int) -> list[int]:
    """The most likely `count` tokens one after the other, by transformers' own generate."""
    ids = torch.tensor([list(prompt)])
    settings = GenerationConfig(max_new_tokens=count, do_sample=False, eos_token_id=[-1])
    out = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=settings)
    return out[0, len(prompt) :].tolist()
