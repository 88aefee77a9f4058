"""Fixtures that tests/weights and tests/tools have in common; their conftests import them."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny_models import MODELS, Checkpoint, Checkpoints

from megatron_gpc.weights import write_hf

__all__ = ["checkpoint", "checkpoints", "sharded"]


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
