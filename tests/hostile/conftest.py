"""The embedded server in this process; at the end, what became of inputs that cannot be."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
from hostile.outcomes import OUTCOMES
from rollout_models import build_model
from starlette.testclient import TestClient

from megatron_gpc.rollout.tokenizer import decoder, load_tokenizer
from megatron_gpc.server.app import Server
from megatron_gpc.server.generator import Generator


@pytest.fixture(autouse=True)
def outside(monkeypatch):
    """No job of Slurm's or torchrun's around the tests."""
    for name in [*os.environ]:
        if name.startswith("SLURM") or name in VARIABLES:
            monkeypatch.setenv(name, "")  # so that what a command sets is undone
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", *VARIABLES):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)


VARIABLES = ("MASTER_ADDR", "MASTER_PORT", "SLURM_NODEID", "SLURM_STEP_NUM_TASKS")


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A test can look inside."""
    folder = build_model(tmp_path_factory.mktemp("hostile") / "model", seed=0)
    tokenizer = load_tokenizer(folder)
    generator = Generator(folder, decode=decoder(tokenizer))
    yield Server(generator, tokenizer, str(folder))
    generator.close()


@pytest.fixture(scope="session")
def client(server: Server) -> TestClient:
    """`raise_server_exceptions=False` shows what the network would."""
    return TestClient(server.app(), raise_server_exceptions=False)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if OUTCOMES:
        counted = ", ".join(f"{count} {what}" for what, count in OUTCOMES.most_common())
        terminalreporter.write_line(f"inputs that cannot be: {counted}")
