"""Checkpoints for the tests of weights/."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from tiny_models import MODELS, Checkpoint, Checkpoints

from megatron_gpc.weights import write_hf


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Checkpoints:
    return Checkpoints(tmp_path_factory.mktemp("checkpoints"))


@pytest.fixture(params=MODELS)
def checkpoint(request: pytest.FixtureRequest, checkpoints: Checkpoints) -> Checkpoint:
    """Each model in turn."""
    return checkpoints[request.param]


@pytest.fixture
def sharded(checkpoints: Checkpoints, tmp_path: Path) -> Path:
    """qwen2-untied in four files and an index, free to damage."""
    folder = tmp_path / "sharded"
    source = checkpoints["qwen2-untied"]
    write_hf(folder, source.tensors().items(), source=source.folder, max_shard_bytes=30_000)
    return folder


@pytest.fixture
def single(checkpoints: Checkpoints, tmp_path: Path) -> Path:
    """qwen2-tied in one file, free to damage."""
    return Path(shutil.copytree(checkpoints["qwen2-tied"].folder, tmp_path / "single"))
