"""The embedded server in this process; at the end, what became of inputs that cannot be."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import pytest
from rollout_models import build_model
from starlette.testclient import TestClient

from megatron_gpc.rollout.tokenizer import decoder, load_tokenizer
from megatron_gpc.server.app import Server
from megatron_gpc.server.generator import Generator


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
    inputs = sys.modules.get("hostile.test_inputs") or sys.modules.get("test_inputs")
    if inputs is not None and inputs.OUTCOMES:
        counted = ", ".join(f"{count} {what}" for what, count in inputs.OUTCOMES.most_common())
        terminalreporter.write_line(f"inputs that cannot be: {counted}")
