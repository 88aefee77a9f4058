"""Tiny models, and the server that the contract tests talk to.

The contract tests run against the embedded server.  To run them against a real SGLang, give the
command that starts it; host, port and model are appended:

    SGLANG_COMMAND="python -m sglang.launch_server --device cpu --attention-backend torch_native
        --dtype float32 --max-total-tokens 4096 --disable-overlap-schedule"
    pytest tests/rollout/test_server_contract.py

With its overlapped schedule SGLang calls one token too few the old weights' own after an in_place
pause: the step in flight at the pause is finished, but labelled after the update.
"""

from __future__ import annotations

import os
import shlex
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from rollout_models import build_model
from transformers import Qwen2ForCausalLM

from megatron_gpc.rollout.launcher import EmbeddedServer


@pytest.fixture(scope="session")
def model_a(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_model(tmp_path_factory.mktemp("model") / "a", seed=0)


@pytest.fixture(scope="session")
def model_b(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Other weights in the shapes of model_a."""
    return build_model(tmp_path_factory.mktemp("model") / "b", seed=1)


@pytest.fixture(scope="session")
def model_tied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_model(tmp_path_factory.mktemp("model") / "tied", seed=2, tied=True)


@pytest.fixture(scope="session")
def reference_a(model_a: Path) -> Qwen2ForCausalLM:
    return Qwen2ForCausalLM.from_pretrained(model_a).eval()


@pytest.fixture(scope="session")
def reference_b(model_b: Path) -> Qwen2ForCausalLM:
    return Qwen2ForCausalLM.from_pretrained(model_b).eval()


@pytest.fixture(scope="session")
def server_url(model_a: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    log = tmp_path_factory.mktemp("server") / "server.log"
    command = os.environ.get("SGLANG_COMMAND")
    if command is None:
        with EmbeddedServer(model_a, log, start_timeout_s=60) as server:
            yield server.url
        return
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    with log.open("w") as output:
        process = subprocess.Popen(
            [*shlex.split(command), "--model-path", str(model_a), "--host", "127.0.0.1",
             "--port", str(port)],
            stdout=output, stderr=subprocess.STDOUT, start_new_session=True)
    try:
        url = f"http://127.0.0.1:{port}"
        _await_healthy(url, process, log)
        yield url
    finally:
        os.killpg(process.pid, signal.SIGKILL)  # SGLang is several processes, slow to end
        process.wait(30)


def _await_healthy(url: str, process: subprocess.Popen, log: Path) -> None:
    deadline = time.monotonic() + 180
    while time.monotonic() < deadline and process.poll() is None:
        try:
            if httpx.get(f"{url}/health", timeout=30).status_code == 200:
                return
        except httpx.TransportError:
            time.sleep(0.5)
    raise RuntimeError(f"the server did not start:\n{log.read_text()[-3000:]}")


@pytest.fixture
def http(server_url: str, model_a: Path) -> Iterator[httpx.Client]:
    """A plain HTTP client; afterwards the server is idle, running and has model_a's weights."""
    with httpx.Client(base_url=server_url, timeout=60, trust_env=False) as client:
        yield client
        client.post("/abort_request", json={"abort_all": True})
        client.post("/continue_generation", json={})
        client.post("/update_weights_from_disk",
                    json={"model_path": str(model_a), "weight_version": "default"})
