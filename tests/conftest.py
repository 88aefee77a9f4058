"""Fixtures for all tests."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from collections.abc import Iterator

import hypothesis
import pytest
from pool import Pools

# Two cores that others may use: a slow example is no failure.  Fixed examples: a red run can be
# redone.
hypothesis.settings.register_profile("house", deadline=None, derandomize=True, database=None)
hypothesis.settings.load_profile("house")


@pytest.fixture(scope="session")
def pool() -> Iterator[Pools]:
    """pool(n): n gloo workers, kept for the whole session."""
    pools = Pools()
    yield pools
    pools.close()
