"""Fixtures for all tests."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import hashlib
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import hypothesis
import pytest
import warm
from commands import ROOT
from pool import Pools

# A shell's background jobs ignore Ctrl-C, and the tests may be one; what they start must not.
signal.signal(signal.SIGINT, signal.default_int_handler)
warm.install()
BUILD = ROOT / "examples" / "arithmetic" / "build.py"

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


@pytest.fixture(autouse=True)
def _signals() -> Iterator[None]:
    """What a command holds back when it runs in this process, it holds back for this test alone."""
    held = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    yield
    signal.pthread_sigmask(signal.SIG_SETMASK, held)


def _needs_warm_start(test: pytest.Item) -> bool:
    return "warm_start" in test.fixturenames


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What needs the example's start comes last: it is built beside the others."""
    items.sort(key=_needs_warm_start)


def _kept_start() -> Path:
    """Where the example's start is kept, from run to run; elsewhere once it would be another."""
    sources = (BUILD, ROOT / "megatron_gpc" / "rewards" / "addition.py")
    versions = [metadata.version(name) for name in ("torch", "transformers", "tokenizers")]
    made_of = repr([versions, *(file.read_bytes() for file in sources)])
    digest = hashlib.sha256(made_of.encode()).hexdigest()[:16]
    return ROOT / "build" / "tests" / f"arithmetic-{digest}"


@pytest.fixture(scope="session", autouse=True)
def _build(request, tmp_path_factory) -> Iterator[Path]:
    """The log of the first process that runs tests: it builds the example's start, if need be."""
    worker = os.environ.get("PYTEST_XDIST_WORKER")
    base = tmp_path_factory.getbasetemp()
    log = (base.parent if worker else base) / "build.log"
    wanted = any(map(_needs_warm_start, request.session.items)) and not _kept_start().exists()
    if worker not in (None, "gw0") or not wanted:
        yield log
        return
    made = base / "start"
    kept = _kept_start()
    kept.parent.mkdir(parents=True, exist_ok=True)
    command = '{ "$0" "$1" "$2" && mv -T "$2" "$3"; } >"$4" 2>&1 || mv "$4" "$4.failed"'
    building = subprocess.Popen(["sh", "-c", command, sys.executable, BUILD, made, kept, log])
    yield log
    building.wait()  # another process may need it


@pytest.fixture(scope="session")
def warm_start(_build) -> Path:
    """examples/arithmetic/build.py's output: checkpoint, tokenizer, prompts; only to be read."""
    deadline, failed = time.monotonic() + 840, _build.with_name("build.log.failed")
    while not _kept_start().exists():
        assert not failed.exists(), failed.read_text()
        assert time.monotonic() < deadline
        time.sleep(0.1)
    return _kept_start()
