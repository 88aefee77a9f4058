"""A run that is disturbed ends as the undisturbed one; `make chaos` does it longer."""

from __future__ import annotations

import socket
import threading
from random import Random
from typing import get_args

import httpx
import pytest
from chaos.campaign import Campaign, undisturbed
from chaos.disk import full_disk, small_disk
from chaos.kinds import KINDS
from chaos.proxy import Cut, Proxy
from chaos.run import make_task

STEPS = 6


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """(task, its undisturbed run)"""
    folder = tmp_path_factory.mktemp("chaos")
    task = make_task(folder / "task")
    return task, undisturbed(task, folder / "undisturbed", STEPS)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["rank", "launcher", "engine", "disk", "network"])
def test_a_run_ends_as_the_undisturbed_one_whatever_happens_to_it(kind, alone, tmp_path):
    if kind == "disk":
        with small_disk(tmp_path / "tried") as mounted:
            if not mounted:
                pytest.skip("mounting a tmpfs is not allowed here")
    task, run = alone
    faults = KINDS[kind](task)
    said: list[str] = []
    campaign = Campaign(kind, faults, task, run, Random(f"test/{kind}"), said.append)
    campaign.strike(len(faults), tmp_path)
    assert campaign.differences == [], said
    assert len(campaign.outcomes) == len(faults)


def test_a_full_disk_is_full(tmp_path):
    with small_disk(tmp_path / "disk") as mounted:
        if not mounted:
            pytest.skip("mounting a tmpfs is not allowed here")
        run_dir = tmp_path / "disk" / "run"
        run_dir.mkdir()
        with full_disk(run_dir, free_bytes=8192), pytest.raises(OSError, match="No space left"):
            (run_dir / "large").write_bytes(bytes(2**20))
        (run_dir / "large").write_bytes(bytes(2**20))


@pytest.mark.parametrize("cut", get_args(Cut))
def test_a_proxy_cuts_and_mends(cut):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(target=_answer, args=(listener,), daemon=True).start()
        with Proxy(listener.getsockname()[1]) as proxy:

            def ask() -> str:
                url = f"http://127.0.0.1:{proxy.port}"
                return httpx.get(url, timeout=0.5, trust_env=False).text

            assert ask() == "a" * 100
            proxy.cut(cut)
            with pytest.raises(httpx.TransportError):
                ask()
            proxy.mend()
            assert ask() == "a" * 100


def _answer(listener: socket.socket) -> None:
    while True:
        try:
            connection, _ = listener.accept()
        except OSError:
            return
        with connection:
            connection.recv(65536)
            connection.sendall(b"HTTP/1.1 200 OK\r\ncontent-length: 100\r\n\r\n" + b"a" * 100)
