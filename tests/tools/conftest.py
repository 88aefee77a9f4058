"""Checkpoints for the tests of the tools."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from checkpoint_fixtures import *  # noqa: F403 - fixtures are found by name
from tiny import byte_tokenizer, tiny_qwen2
from tiny_models import Checkpoints
from tool_scripts import CARRIED

from megatron_gpc.weights import family_of, write_hf
from megatron_gpc.weights.convert import hf_to_megatron


@pytest.fixture
def single(checkpoints: Checkpoints, tmp_path: Path) -> Path:
    """qwen2-tied in one file, free to damage, with everything that goes along."""
    folder = Path(shutil.copytree(checkpoints["qwen2-tied"].folder, tmp_path / "single"))
    for name, text in CARRIED.items():
        (folder / name).write_text(text)
    return folder


@pytest.fixture
def converted(single: Path, tmp_path: Path) -> Path:
    """`single` as a distributed checkpoint, free to damage."""
    hf_to_megatron(single, tmp_path / "converted")
    return tmp_path / "converted"


@pytest.fixture(scope="session")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Qwen2 of 230 MB in float32; the largest Megatron tensor has 64 MiB."""
    folder = tmp_path_factory.mktemp("large")
    settings = {
        **{"model_type": "qwen2", "hidden_size": 512, "intermediate_size": 16384},
        **{"num_hidden_layers": 2, "num_attention_heads": 8, "num_key_value_heads": 2},
        **{"vocab_size": 16001, "max_position_embeddings": 64, "tie_word_embeddings": True},
    }
    (folder / "config.json").write_text(json.dumps(settings))
    tensors = (
        (name, torch.zeros(shape))
        for param in family_of(settings).params(settings)
        for name, shape in zip(param.hf, param.hf_shapes, strict=True)
    )
    write_hf(folder / "hf", tensors, source=folder)
    return folder / "hf"


@pytest.fixture
def with_tokenizer(tmp_path: Path) -> Path:
    """A random Qwen2 with a tokenizer of one token a byte."""
    return byte_tokenizer(tiny_qwen2(tmp_path / "start", vocab_size=256))
