"""Checkpoints for the tests of weights/."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from checkpoint_fixtures import *  # noqa: F403 - fixtures are found by name
from tiny_models import Checkpoints


@pytest.fixture
def single(checkpoints: Checkpoints, tmp_path: Path) -> Path:
    """qwen2-tied in one file, free to damage."""
    return Path(shutil.copytree(checkpoints["qwen2-tied"].folder, tmp_path / "single"))
