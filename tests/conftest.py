"""Fixtures for all tests."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest
from commands import ROOT
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


def _needs_warm_start(test: pytest.Item) -> bool:
    return "warm_start" in test.fixturenames


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What needs the example's start comes last: it is built beside the others."""
    items.sort(key=_needs_warm_start)


@pytest.fixture(scope="session", autouse=True)
def _build(request, tmp_path_factory) -> Iterator[tuple[subprocess.Popen, Path, Path] | None]:
    """What builds the example's start, its log and its folder; None where nobody needs it."""
    if not any(map(_needs_warm_start, request.session.items)):
        yield None
        return
    folder = tmp_path_factory.mktemp("arithmetic") / "start"
    log = folder.with_name("build.log")
    script = ROOT / "examples" / "arithmetic" / "build.py"
    with log.open("w") as output:
        process = subprocess.Popen([sys.executable, script, folder], stdout=output, stderr=output)
    yield process, log, folder
    process.kill()
    process.wait()


@pytest.fixture(scope="session")
def warm_start(_build) -> Path:
    """examples/arithmetic/build.py's output: checkpoint, tokenizer, prompts."""
    process, log, folder = _build
    assert process.wait(840) == 0, log.read_text()
    return folder
