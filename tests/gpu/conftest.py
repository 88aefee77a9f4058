"""Fixtures of the tests that need GPUs."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from layout_fixtures import *  # noqa: F403 - fixtures are found by name
from pool import Pools


@pytest.fixture(scope="session")
def gpu_pool() -> Iterator[Pools]:
    """gpu_pool(n): n workers with a GPU each, over NCCL."""
    pools = Pools(cuda=True)
    yield pools
    pools.close()


@pytest.fixture(autouse=True)
def enough_gpus(request: pytest.FixtureRequest) -> None:
    """Skip what needs more GPUs than there are."""
    world = request.getfixturevalue("layout").world
    if torch.cuda.device_count() < world:
        pytest.skip(f"needs {world} GPUs, and there are {torch.cuda.device_count()}")
