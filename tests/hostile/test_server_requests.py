"""The embedded server goes on, whatever one request costs or breaks; refusals: test_requests.py.

One server in this process; `raise_server_exceptions=False` shows what the network would.
"""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import httpx
import pytest
from listening import listening
from starlette.testclient import TestClient

from megatron_gpc.server import gate, sampling, weight_receiver
from megatron_gpc.server.gate import BoundedProtocol, Gate
from megatron_gpc.server.weight_receiver import MOST_GROUPS

pytestmark = pytest.mark.timeout(120)


def works(client: TestClient) -> None:
    answer = client.post(
        "/generate", json={"input_ids": [53], "sampling_params": {"max_new_tokens": 2}}
    )
    assert answer.status_code == 200 and answer.json()["output_ids"], answer.text


@pytest.mark.parametrize(
    "value",
    [
        {"top_k": 1},
        {"top_k": 2**31 - 1},
        {"top_p": 1e-300},
        {"temperature": 1e-300},
        {"temperature": 1e-6},
        {"temperature": 1e6},
        {"sampling_seed": 2**64 - 1},
        {"top_k": None, "stop": None},
    ],
)
def test_what_stands_at_the_bounds_is_sampled(client, value):
    params = value | {"max_new_tokens": 3, "ignore_eos": True}
    answer = client.post("/generate", json={"input_ids": [53], "sampling_params": params})
    assert answer.status_code == 200 and len(answer.json()["output_ids"]) == 3, answer.text


@pytest.mark.parametrize("pass_", ["prefill", "decode"])
def test_a_draw_that_fails_fails_one_request(server, client, monkeypatch, pass_):
    """The example of the kind: a parameter that no check has seen and torch cannot take."""
    monkeypatch.setattr(sampling, "_check_values", lambda params: None)
    params = {"max_new_tokens": 40, "ignore_eos": True, "sampling_seed": 3}
    good = {"input_ids": [[5], [6, 7]], "sampling_params": params}
    expected = [answer["output_ids"] for answer in client.post("/generate", json=good).json()]
    bad = {"input_ids": [53], "sampling_params": {"top_k": 2**70, "max_new_tokens": 3}}
    if pass_ == "decode":  # the draw fails on its second token only
        draw = sampling.draw

        def fails(logits_BV, rows, uniforms_B):
            if logits_BV.shape[0] and any(p.n == 1 and p.min_new_tokens == 1 for p in rows):
                calls.append(len(rows))
                if len(calls) > 1:
                    raise RuntimeError("cannot draw")
            return draw(logits_BV, rows, uniforms_B)

        calls: list[int] = []
        monkeypatch.setattr(sampling, "draw", fails)
        bad["sampling_params"] = {"min_new_tokens": 1, "max_new_tokens": 3, "ignore_eos": True}
    answers: list[httpx.Response] = []
    beside = threading.Thread(target=lambda: answers.append(client.post("/generate", json=good)))
    beside.start()
    failed = client.post("/generate", json=bad)
    beside.join(30)
    assert failed.status_code == 500 and "request" in failed.json()["error"]["message"]
    assert [answer["output_ids"] for answer in answers[0].json()] == expected
    monkeypatch.undo()
    works(client)
    assert client.get("/health").status_code == 200
    assert server.generator.load().result(5) == (0, 0)


def test_a_stop_text_that_cannot_be_read_fails_its_request(server, client, monkeypatch):
    def broken(tokens: Any) -> str:
        raise ValueError("no such token")

    monkeypatch.setattr(server.generator, "_decode_text", broken)
    body = {"input_ids": [53], "sampling_params": {"stop": ["x"], "n": 3, "max_new_tokens": 9}}
    failed = client.post("/generate", json=body)
    assert failed.status_code == 500 and "no such token" in failed.json()["error"]["message"]
    works(client)
    assert server.generator.load().result(5) == (0, 0)


def test_joins_to_a_dead_address_block_nobody(client, monkeypatch):
    monkeypatch.setattr(weight_receiver, "CONNECT_TIMEOUT_S", 2.0)
    with socket.socket() as deaf:  # has a port, and nobody listens there
        deaf.bind(("127.0.0.1", 0))
        body = {
            "master_address": "127.0.0.1",
            "master_port": deaf.getsockname()[1],
            "rank_offset": 1,
            "world_size": 2,
            "backend": "gloo",
        }
        joins = [
            threading.Thread(
                target=client.post,
                args=("/init_weights_update_group",),
                kwargs={"json": body | {"group_name": f"dead-{i}"}},
                daemon=True,
            )
            for i in range(40)
        ]
        for join in joins:
            join.start()
        deadline = time.monotonic() + 10
        while sum(join.is_alive() for join in joins) > MOST_GROUPS:
            assert time.monotonic() < deadline, "joins beyond the bound are not refused at once"
            time.sleep(0.02)
        works(client)
        assert client.get("/health").status_code == 200
        for join in joins:
            join.join(30)


def test_bodies_have_a_bound(server):
    client = TestClient(
        Gate(server.app().app, None, lambda path: 100), raise_server_exceptions=False
    )

    def pieces() -> Iterator[bytes]:
        for _ in range(20):
            yield b" " * 10

    good = {"input_ids": [5], "sampling_params": {"max_new_tokens": 1}}
    assert client.post("/generate", json=good).status_code == 200
    assert client.post("/generate", content=b" " * 101).status_code == 413
    assert client.post("/generate", content=pieces()).status_code == 413


def test_half_a_request_is_not_waited_for(server, monkeypatch):
    monkeypatch.setattr(gate, "CLIENT_TIMEOUT_S", 0.3)
    monkeypatch.setattr(gate, "BODY_TIMEOUT_S", 0.3)
    whole = b"GET /ping HTTP/1.1\r\nHost: x\r\n\r\n"
    with listening(server.app()) as port:
        for sent, answer in (
            (b"", b""),
            (b"POST /generate HTTP/1.1\r\nHost: x\r\n", b""),
            (b"POST /generate HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\n{", b"HTTP/1.1 408"),
            (whole + b"GET /pi", b"HTTP/1.1 200"),
        ):
            with socket.create_connection(("127.0.0.1", port), timeout=20) as connection:
                connection.sendall(sent)
                found = until_closed(connection)
                assert found[: len(answer)] == answer and bool(found) == bool(answer)


def until_closed(connection: socket.socket) -> bytes:
    found = b""
    while piece := connection.recv(4096):
        found += piece
    return found


def test_400_half_requests_keep_nobody_waiting_and_are_closed(server, monkeypatch):
    monkeypatch.setattr(gate, "CLIENT_TIMEOUT_S", 4.0)
    with listening(server.app()) as port, ExitStack() as opened:
        half = [
            opened.enter_context(socket.create_connection(("127.0.0.1", port), timeout=30))
            for _ in range(400)
        ]
        for connection in half:
            connection.sendall(b"POST /generate HTTP/1.1\r\nHost: x\r\n")
        body = {"input_ids": [53], "sampling_params": {"max_new_tokens": 2}}
        url = f"http://127.0.0.1:{port}/generate"
        assert httpx.post(url, json=body, trust_env=False, timeout=10).status_code == 200
        assert {until_closed(connection) for connection in half} == {b""}


def test_idle_connections_take_no_place_from_who_asks(server, monkeypatch):
    monkeypatch.setattr(BoundedProtocol, "most", 50)
    with listening(server.app()) as port, ExitStack() as opened:
        idle = []
        for _ in range(300):  # as few as the bound at a time, whoever else there is
            connection = socket.create_connection(("127.0.0.1", port), timeout=30)
            idle.append(opened.enter_context(connection))
            connection.sendall(b"GET /p")
        asks(port)
        ended = [connection for connection in idle if is_ended(connection)]
        assert 240 < len(ended) <= 260, "all but the newest, of what waits for longest"
        asks(port)


def is_ended(connection: socket.socket) -> bool:
    connection.settimeout(0.01)
    try:
        return connection.recv(1) == b""
    except TimeoutError:
        return False
    except ConnectionResetError:
        return True


def asks(port: int) -> None:
    body = {"input_ids": [53], "sampling_params": {"max_new_tokens": 2}}
    url = f"http://127.0.0.1:{port}/generate"
    assert httpx.post(url, json=body, trust_env=False, timeout=10).status_code == 200


READERS = {
    "one large answer": (b"GET /large HTTP/1.1\r\nHost: x\r\n\r\n", 1),
    "many answers to many requests": (b"GET /some HTTP/1.1\r\nHost: x\r\n\r\n", 2000),
}


@pytest.mark.parametrize("name", READERS)
def test_a_client_that_does_not_read_is_left_alone(monkeypatch, name):
    monkeypatch.setattr(gate, "CLIENT_TIMEOUT_S", 0.4)
    request, times = READERS[name]
    protocols: set[BoundedProtocol] = set()
    made = BoundedProtocol.connection_made
    monkeypatch.setattr(
        BoundedProtocol,
        "connection_made",
        lambda self, transport: (protocols.add(self), made(self, transport)),
    )

    async def app(scope: Any, receive: Any, send: Any) -> None:
        size = 2**24 if scope["path"] == "/large" else 2**16
        headers = [(b"content-length", str(size).encode())]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": bytes(size)})

    with listening(Gate(app, None, lambda path: 10)) as port:
        with socket.create_connection(("127.0.0.1", port), timeout=10) as slow:
            slow.sendall(request * times)
            begin, found = time.monotonic(), 0
            while found < 2**22 and time.monotonic() < begin + 1.5:  # it goes on for who reads
                found += len(slow.recv(2**16))
                time.sleep(0.02)
            deadline = time.monotonic() + 10
            while any(protocol.connections for protocol in protocols):
                assert time.monotonic() < deadline, "the connection stays open"
                time.sleep(0.02)
        assert found > 2**20 and len(protocols) == 1


def test_a_body_without_the_key_has_a_small_bound(server):
    client = TestClient(server.app("key"), raise_server_exceptions=False)
    assert client.request("GET", "/health", content=b"x" * 1024).status_code == 200
    assert client.request("GET", "/health", content=b"x" * 1025).status_code == 413
    assert client.request("GET", "/server_info", content=b"x" * 1025).status_code == 401


def test_those_who_ask_for_health_share_one_probe(server, monkeypatch):
    asked, load, held = [], server.generator.load, threading.Event()
    monkeypatch.setattr(server.generator, "load", lambda: (asked.append(1), load())[1])
    server.generator._call(lambda: held.wait(20))
    statuses: list[int] = []
    with listening(server.app()) as port:
        url = f"http://127.0.0.1:{port}/health"

        def ask() -> None:
            statuses.append(httpx.get(url, trust_env=False, timeout=20).status_code)

        threads = [threading.Thread(target=ask) for _ in range(20)]
        for thread in threads:
            thread.start()
        deadline = time.monotonic() + 10
        while not asked and time.monotonic() < deadline:
            time.sleep(0.02)
        time.sleep(0.2)  # for those that would ask for themselves
        held.set()
        for thread in threads:
            thread.join(20)
    assert statuses == [200] * 20 and len(asked) < 10
