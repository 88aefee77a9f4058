"""Fixtures for all tests."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import subprocess
import sys
import time
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
def _build(request, tmp_path_factory) -> Iterator[Path]:
    """Where the first process that runs tests builds the example's start, if need be."""
    worker = os.environ.get("PYTEST_XDIST_WORKER")
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if worker else base) / "arithmetic"
    if worker not in (None, "gw0") or not any(map(_needs_warm_start, request.session.items)):
        yield folder
        return
    folder.mkdir()
    script = ROOT / "examples" / "arithmetic" / "build.py"
    command = '"$0" "$1" start >log 2>&1; echo $? >part; mv part exit_code'
    building = subprocess.Popen(["sh", "-c", command, sys.executable, script], cwd=folder)
    yield folder
    building.wait()  # another process may need it


@pytest.fixture(scope="session")
def warm_start(_build) -> Path:
    """examples/arithmetic/build.py's output: checkpoint, tokenizer, prompts."""
    deadline = time.monotonic() + 840
    while not (_build / "exit_code").exists():
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert (_build / "exit_code").read_text() == "0\n", (_build / "log").read_text()
    return _build / "start"
