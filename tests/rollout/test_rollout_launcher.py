"""The embedded server's process: up or explained, and never left behind."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx
import pytest
import yaml
from tiny import run_config

from megatron_gpc.engines.keys import read_key
from megatron_gpc.engines.process import EmbeddedServer, server_environment
from megatron_gpc.engines.starter import Starter
from megatron_gpc.run.network import free_port
from megatron_gpc.server.app import listen


def gone(pid: int, within_s: float) -> bool:
    """Whether a process that is not our child ends in time (a zombie has ended)."""
    deadline = time.monotonic() + within_s
    while time.monotonic() < deadline:
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except (FileNotFoundError, ProcessLookupError):
            return True
        if state == "Z":
            return True
        time.sleep(0.05)
    return False


def test_the_server_lives_as_long_as_the_with_block(model_a, tmp_path):
    with EmbeddedServer(model_a, tmp_path / "logs" / "server.log", start_timeout_s=60) as server:
        assert server.alive() and server.url.startswith("http://127.0.0.1:")
        assert httpx.get(f"{server.url}/health", trust_env=False).status_code == 200
    assert not server.alive()
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{server.url}/health", trust_env=False)
    server.stop()  # again: nothing happens
    assert "Traceback" not in (tmp_path / "logs" / "server.log").read_text()


def test_the_server_dies_with_its_parent_even_on_sigkill(model_a, tmp_path):
    code = (
        "import sys, time\nfrom pathlib import Path\n"
        "from megatron_gpc.engines.process import EmbeddedServer\n"
        f"server = EmbeddedServer(Path({str(model_a)!r}), Path({str(tmp_path / 'log')!r}))\n"
        "print(server.pid, flush=True)\ntime.sleep(60)\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    try:
        pid = int(parent.stdout.readline())
        os.kill(pid, 0)
    finally:
        parent.kill()
        parent.wait(10)
        parent.stdout.close()
    assert gone(pid, within_s=5)


def test_an_early_death_is_reported_with_the_end_of_the_log(tmp_path, monkeypatch):
    (tmp_path / "megatron_gpc").mkdir()  # not to be mistaken for the package
    (tmp_path / "megatron_gpc" / "__init__.py").write_text("raise SystemExit(7)")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "server.log").write_text("what an earlier server said\n")
    with pytest.raises(RuntimeError, match=r"ended while starting \(exit code 1\)") as died:
        EmbeddedServer(tmp_path / "nowhere", tmp_path / "server.log", start_timeout_s=60)
    assert f"{tmp_path / 'nowhere'} is not a folder" in str(died.value)
    assert "earlier" not in str(died.value)
    assert (tmp_path / "server.log").read_text().startswith("what an earlier server said")


def test_a_start_that_takes_too_long_is_ended(model_a, tmp_path):
    started = time.monotonic()
    with pytest.raises(RuntimeError, match=r"not up after 0.001 s"):
        EmbeddedServer(model_a, tmp_path / "server.log", start_timeout_s=0.001)
    assert time.monotonic() - started < 10


def test_a_start_that_nobody_waits_for_any_longer_is_ended(model_a, tmp_path):
    given_up = threading.Event()
    given_up.set()
    started = time.monotonic()
    with pytest.raises(RuntimeError, match="nobody waits for it"):
        EmbeddedServer(model_a, tmp_path / "server.log", given_up=given_up)
    assert time.monotonic() - started < 5


def test_ctrl_c_and_sigterm_are_not_for_a_server_that_a_run_has_started(model_a, tmp_path):
    with EmbeddedServer(model_a, tmp_path / "server.log", start_timeout_s=60) as server:
        for one in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
            os.kill(server.pid, one)
        assert httpx.get(f"{server.url}/health", trust_env=False).status_code == 200
    assert (tmp_path / "server.log").read_text() == ""


SGLANG = """
import http.server, json, sys

class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(json.dumps(sys.argv[1:]).encode())

port = int(sys.argv[sys.argv.index("--port") + 1])
http.server.HTTPServer(("127.0.0.1", port), Handler).serve_forever()
"""


@pytest.mark.parametrize(
    ("overrides", "given"),
    [
        (["sglang.args.device=cpu"], {"--device": "cpu"}),
        (["sglang.args.tp_size=2"], {"--tp-size": "2", "--base-gpu-id": "2"}),
        (["rollout.server.colocated=true"], {"--base-gpu-id": "1", "--enable-memory-saver": None}),
    ],
    ids=["cpu", "tp", "colocated"],
)
def test_sglang_is_started_on_its_port_with_what_is_configured(tmp_path, overrides, given):
    """A stand-in for SGLang says with which arguments it was started."""
    (tmp_path / "sglang").mkdir()
    (tmp_path / "sglang" / "launch_server.py").write_text(SGLANG)
    config = run_config(
        tmp_path,
        tmp_path / "hf",
        *("rollout.server.kind=sglang", "rollout.server.engines=2", *overrides),
        f"sglang.environment.PYTHONPATH={tmp_path}",
    )
    starter = Starter(config.rollout.server, config.sglang, tmp_path / "hf", tmp_path / "logs")
    port = free_port()
    with starter.engine(1, port) as server:
        assert server.url == f"http://127.0.0.1:{port}"
        found = httpx.get(f"{server.url}/arguments", trust_env=False).json()
    secrets = tmp_path / "logs" / "sglang_secrets.yaml"
    always = {"--host": "127.0.0.1", "--port": str(port), "--model-path": str(tmp_path / "hf")}
    always["--config"] = str(secrets)
    expected = [word for pair in (always | given).items() for word in pair if word is not None]
    assert sorted(found) == sorted(expected)
    key = read_key(tmp_path / "logs" / "api_key")
    assert yaml.safe_load(secrets.read_text()) == {"api-key": key}
    assert secrets.stat().st_mode & 0o777 == 0o600 and key not in " ".join(found)


def test_sglang_inherits_nothing_that_a_rank_sets_for_itself(monkeypatch):
    for name in ("RANK", "CUDA_DEVICE_MAX_CONNECTIONS", "PYTORCH_CUDA_ALLOC_CONF", "NCCL_DEBUG"):
        monkeypatch.setenv(name, "of the rank")
    found = server_environment({"PYTORCH_CUDA_ALLOC_CONF": "given"})
    assert found["PYTORCH_CUDA_ALLOC_CONF"] == "given" and found["NCCL_DEBUG"] == "of the rank"
    assert not {"RANK", "CUDA_DEVICE_MAX_CONNECTIONS"} & found.keys()


def test_connections_of_the_embedded_server_do_not_wait_for_acknowledgements():
    with listen("127.0.0.1", 0) as listener, socket.create_connection(listener.getsockname()):
        connection, _ = listener.accept()
        with connection:
            assert connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
