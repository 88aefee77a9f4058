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
from megatron_gpc.server.gate import Gate
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
    monkeypatch.setattr(gate, "HEADER_TIMEOUT_S", 0.3)
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
    monkeypatch.setattr(gate, "HEADER_TIMEOUT_S", 4.0)
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
