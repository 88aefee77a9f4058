"""Tiny random checkpoints of every family, written by transformers; looking into folders."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor

_DENSE = {
    "vocab_size": 131,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
_MOE = {**_DENSE, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
_YARN = {
    "rope_type": "yarn",
    "factor": 4.0,
    "original_max_position_embeddings": 16,
    "rope_theta": 1000.0,
}

MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    # the name says what is special; vocabulary 131 divides by no tp, 2 key-value heads are few at 4
    "qwen2-tied": ("Qwen2", {**_DENSE, "tie_word_embeddings": True}),
    "qwen2-untied": (
        "Qwen2",
        {**_DENSE, "rope_parameters": {"rope_theta": 1e6, "rope_type": "default"}},
    ),
    "qwen2-one-kv-head": ("Qwen2", {**_DENSE, "num_key_value_heads": 1, "vocab_size": 128}),
    "qwen2-yarn": ("Qwen2", {**_DENSE, "rope_parameters": _YARN}),
    "qwen2-yarn-attention-factor": (
        "Qwen2",
        {**_DENSE, "rope_parameters": {**_YARN, "attention_factor": 1.3}},
    ),
    "qwen2-linear-rope": (
        "Qwen2",
        {**_DENSE, "rope_parameters": {"rope_type": "linear", "factor": 3.0, "rope_theta": 1000.0}},
    ),
    "qwen3": ("Qwen3", {**_DENSE, "head_dim": 16}),
    "qwen3-tied": ("Qwen3", {**_DENSE, "head_dim": 16, "tie_word_embeddings": True}),
    "qwen3_moe": ("Qwen3Moe", {**_MOE, "head_dim": 16, "norm_topk_prob": True}),
    "qwen3_moe-some-dense": ("Qwen3Moe", {**_MOE, "head_dim": 16, "mlp_only_layers": [0]}),
    "qwen2_moe": ("Qwen2Moe", {**_MOE, "shared_expert_intermediate_size": 40}),
    "qwen2_moe-every-second": (
        "Qwen2Moe",
        {
            **_MOE,
            "shared_expert_intermediate_size": 40,
            "decoder_sparse_step": 2,
            "norm_topk_prob": True,
            "qkv_bias": False,
            "tie_word_embeddings": True,
        },
    ),
}


@dataclass(frozen=True)
class Checkpoint:
    name: str
    folder: Path
    config: dict[str, Any]
    """config.json as transformers wrote it."""

    def tensors(self) -> dict[str, Tensor]:
        return load_file(self.folder / "model.safetensors")


def make_model(name: str, **changes: Any) -> transformers.PreTrainedModel:
    """Weights wide enough that a permuted row moves every logit; random norms and biases.

    Args:
        changes: settings that differ from those of MODELS.
    """
    family, settings = MODELS[name]
    config = getattr(transformers, f"{family}Config")(**{**settings, **changes})
    config._attn_implementation = "eager"
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
            if "norm" in key:
                parameter.add_(1.0)
    return model


class Checkpoints:
    """Made when first asked for."""

    def __init__(self, root: Path) -> None:
        self.root, self.made = root, {}

    def __getitem__(self, name: str) -> Checkpoint:
        if name not in self.made:
            folder = self.root / name
            make_model(name).save_pretrained(folder)
            config = json.loads((folder / "config.json").read_text())
            self.made[name] = Checkpoint(name, folder, config)
        return self.made[name]


def content(folder: Path) -> dict[str, Tensor]:
    """Every tensor of a folder, as the safetensors library reads it."""
    return {
        name: tensor
        for file in folder.glob("*.safetensors")
        for name, tensor in load_file(file).items()
    }


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(
        a[name].dtype == b[name].dtype and torch.equal(a[name], b[name]) for name in a
    )


def names(folder: Path) -> set[str]:
    return {file.name for file in folder.iterdir()}
