"""What the careless and the hostile send to the embedded server: 4xx, in time, and it goes on.

One server in this process; `raise_server_exceptions=False` shows what the network would.
"""

from __future__ import annotations

import base64
import json
import pickle
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
import torch
import uvicorn
from rollout_models import build_model
from starlette.testclient import TestClient
from torch._utils import _rebuild_tensor_v2

from megatron_gpc.errors import UserError
from megatron_gpc.rollout.tokenizer import decoder, load_tokenizer
from megatron_gpc.server import gate, sampling, weight_receiver
from megatron_gpc.server.app import Server
from megatron_gpc.server.gate import Gate
from megatron_gpc.server.generator import Generator
from megatron_gpc.server.loading import unpack_tensors
from megatron_gpc.server.weight_receiver import MOST_GROUPS, WeightReceiver

pytestmark = pytest.mark.timeout(120)
HUGE = 10**400
NOT_NUMBERS = [True, "1", [1], {}, float("nan"), float("inf"), float("-inf")]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = build_model(tmp_path_factory.mktemp("hostile") / "model", seed=0)
    tokenizer = load_tokenizer(folder)
    generator = Generator(folder, decode=decoder(tokenizer))
    yield Server(generator, tokenizer, str(folder))
    generator.close()


@pytest.fixture(scope="module")
def client(server: Server) -> TestClient:
    return TestClient(server.app(), raise_server_exceptions=False)


def refused(response: httpx.Response) -> str:
    """The message of a 4xx."""
    assert 400 <= response.status_code < 500, (response.status_code, response.text[:500])
    content = response.json()
    message = content["message"] if "message" in content else content["error"]["message"]
    assert message and "\n" not in message and len(message) < 500, message
    return message


def works(client: TestClient) -> None:
    answer = client.post(
        "/generate", json={"input_ids": [53], "sampling_params": {"max_new_tokens": 2}}
    )
    assert answer.status_code == 200 and answer.json()["output_ids"], answer.text


SAMPLING = {
    "temperature": [-1, 10**400, 1e7, *NOT_NUMBERS],
    "top_p": [0, -0.1, 1.1, HUGE, -HUGE, *NOT_NUMBERS],
    "top_k": [0, -2, 2**31, 2**70, -(2**70), HUGE, 1.5, *NOT_NUMBERS],
    "max_new_tokens": [0, -1, 2**31, 2**63, 2**70, HUGE, 1.5, *NOT_NUMBERS],
    "min_new_tokens": [-1, 1000, 2**70, HUGE, 1.5, *NOT_NUMBERS],
    "n": [0, -1, 4097, 10**9, 2**70, HUGE, 1.5, *NOT_NUMBERS],
    "sampling_seed": [-1, 2**64, HUGE, 1.5, *NOT_NUMBERS],
    "stop_token_ids": [[-1], [264], [2**70], [HUGE], [1.5], [True], ["1"], 1, "1", {}, [[1]]],
    "stop": ["", [""], [1], 1, {}, ["."] * 257, "x" * 4097, ["\ud800"]],
    "ignore_eos": [1, 0, "yes", [], HUGE],
}


@pytest.mark.parametrize("name", SAMPLING)
def test_every_sampling_parameter_has_bounds(client, name):
    for value in SAMPLING[name]:
        # not json=...: that refuses nan and inf, which Python's reader takes
        content = _json({"input_ids": [53], "sampling_params": {name: value}})
        message = refused(client.post("/generate", content=content, headers=JSON))
        assert name in message, (value, message)
    works(client)


JSON = {"content-type": "application/json"}


def _json(body: Any) -> bytes:
    return json.dumps(body).encode()


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


def test_an_end_that_is_held_back_must_leave_a_token(client):
    params = {"stop_token_ids": list(range(264)), "min_new_tokens": 1}
    body = {"input_ids": [53], "sampling_params": params}
    assert "all tokens" in refused(client.post("/generate", json=body))


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


IDS = [
    ["53"], [True], [1.5], [-1], [264], [2**70], [HUGE], [None], ["\ud800"], [[1], "x"], [[1], 1],
    [[True]], [["1"]], [[]], [], [[5], []], "5", 5, {}, True, [float("nan")],
]  # fmt: skip


def test_token_ids_are_numbers_of_the_vocabulary(client):
    for ids in IDS:
        refused(client.post("/generate", content=_json({"input_ids": ids}), headers=JSON))
    works(client)


@pytest.mark.parametrize(
    "body",
    [
        {"text": []},
        {"text": 5},
        {"text": ""},
        {"text": ["a", ""]},
        {"text": "\ud800"},
        {"text": ["a", "\ud800"]},
        {"text": "a", "rid": "\ud800"},
        {"text": "a", "rid": 5},
        {"text": "a", "rid": "x" * 1025},
        {"text": ["a", "b"], "rid": ["x"]},
        {"text": ["a", "b"], "rid": ["x", "x"]},
        {"text": ["a", "b"], "rid": ["x", None]},
        {"text": "a", "return_logprob": "yes"},
        {"text": "a", "return_logprob": 1},
        {"text": ["a", "b"], "return_logprob": [True]},
        {"text": "a", "stream": True},
        {"text": "a", "stream": "no"},
        {"text": "a", "sampling_params": []},
        {"text": ["a", "b"], "sampling_params": []},
        {"text": "a", "sampling_params": "hot"},
        {"text": "a", "sampling_params": {"\ud800": 1}},
        {"text": "a", "sampling_params": {"no_such": 1}},
        {"text": "a" * 5000},
        {},
        [],
        None,
        "text",
    ],
)
def test_a_body_that_cannot_be_is_refused(client, body):
    refused(client.post("/generate", content=_json(body), headers=JSON))
    works(client)


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"\xff\xfe", b"[" * 100_000, b'{"text": "a", "n": ' + b"9" * 5000 + b"}", b"\0"],
)
def test_what_is_no_json_is_refused(client, content):
    response = client.post("/generate", content=content, headers=JSON)
    assert 400 <= response.status_code < 500, response.text
    works(client)


CONTROL = {
    "/pause_generation": [{"mode": "now"}, {"mode": 1}, {"mode": ["abort"]}, [], None],
    "/abort_request": [{}, {"rid": ""}, {"rid": 1}, {"rid": "\ud800"}, {"abort_all": "yes"}, []],
    "/update_weights_from_disk": [
        {},
        {"model_path": 1},
        {"model_path": ""},
        {"model_path": "/no/such/folder"},
        {"model_path": "/" + "a" * 300},
        {"model_path": "/a" * 3000},
        {"model_path": "a\0b"},
        {"model_path": "\ud800"},
        {"model_path": "/dev/null"},
        {"model_path": "/proc"},
        {"model_path": "/no/such/folder", "weight_version": 1},
        {"model_path": "/no/such/folder", "weight_version": "v" * 2000},
        {"model_path": "/no/such/folder", "abort_all_requests": 1},
    ],
    "/update_weight_version": [{}, {"new_version": 1}, {"new_version": "\ud800"}],
    "/release_memory_occupation": [{"tags": []}, {"tags": ["x"]}, {"tags": "weights"}, {"tags": 1}],
    "/resume_memory_occupation": [{"tags": []}, {"tags": ["x"]}, {"tags": ["weights"]}, {}],
    "/destroy_weights_update_group": [{}, {"group_name": "none"}, {"group_name": 1}],
    "/init_weights_update_group": [
        {},
        *(
            {"master_address": "127.0.0.1", "master_port": 1, "rank_offset": 1, "world_size": 2}
            | change
            for change in (
                {"master_port": 99999},
                {"master_port": 0},
                {"master_port": "1"},
                {"master_port": 2**70},
                {"rank_offset": -1},
                {"rank_offset": 2, "backend": "gloo"},
                {"rank_offset": True},
                {"world_size": 10**9},
                {"world_size": 1},
                {"backend": "nccl"},
                {"backend": "mpi"},
                {"master_address": "\ud800"},
                {"master_address": 1},
                {"group_name": "g" * 2000},
            )
        ),
    ],
    "/no_such_path": [{}],
}


@pytest.mark.parametrize("path", CONTROL)
def test_what_no_engine_can_do_is_refused(server, client, path):
    for body in CONTROL[path]:
        response = client.post(path, content=_json(body), headers=JSON)
        assert 400 <= response.status_code < 500, (body, response.status_code, response.text[:300])
    assert not server.generator.paused and not server.generator.released
    works(client)


def packed(named: Any) -> str:
    return base64.b64encode(pickle.dumps(named)).decode()


NORM = "model.norm.weight"  # [32]


@pytest.mark.parametrize(
    ("named", "says"),
    [
        ([(NORM, torch.ones(32)), (NORM, torch.ones(32))], "comes 2 times"),
        ([(NORM, torch.ones(32, dtype=torch.int64))], "floating-point"),
        ([(NORM, torch.ones(32, dtype=torch.bool))], "floating-point"),
        ([(NORM, torch.ones(33))], "has shape"),
        ([(NORM, torch.ones(1).expand(10**12))], "has shape"),
        ([("model.norm", torch.ones(32))], "no such tensor"),
        ([(NORM, torch.nn.Parameter(torch.ones(32)))], "not part of a plain tensor"),
        ([(NORM, 1.0)], "expected a pickled list"),
        ({NORM: torch.ones(32)}, "expected a pickled list"),
        (None, "expected a pickled list"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_tensors_that_are_not_the_models_are_refused(client, named, says):
    client.post("/begin_weight_update", json={})
    body = {"serialized_named_tensors": [packed(named)], "weight_version": "bad"}
    assert says in refused(client.post("/update_weights_from_tensor", json=body))
    client.post("/end_weight_update", json={})
    assert client.get("/model_info").json()["weight_version"] == "default"
    works(client)


@pytest.mark.parametrize(
    "text", ["", "%", "\ud800", "AAAA", base64.b64encode(b"\x80\x04.").decode()]
)
def test_what_is_no_pickle_is_refused(client, text):
    client.post("/begin_weight_update", json={})
    body = {"serialized_named_tensors": [text]}
    refused(client.post("/update_weights_from_tensor", content=_json(body), headers=JSON))
    client.post("/end_weight_update", json={})


def test_a_pickle_changes_nothing_for_good():
    """BUILD sets attributes of what find_class hands out; torch's own function must not be that."""
    named = b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n}X\x05\x00\x00\x00spoilK\x01sb."
    with pytest.raises(UserError, match="expected a pickled list"):
        unpack_tensors(base64.b64encode(named).decode())
    defaults = b"N}X\x0c\x00\x00\x00__defaults__)s\x86"
    content = b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n" + defaults + b"b."
    with pytest.raises(UserError):
        unpack_tensors(base64.b64encode(content).decode())
    assert not hasattr(_rebuild_tensor_v2, "spoil")
    assert _rebuild_tensor_v2.__defaults__ == (None,)
    (back,) = unpack_tensors(packed([(NORM, torch.ones(2))]))
    assert back[0] == NORM and torch.equal(back[1], torch.ones(2))


def test_a_broadcast_is_held_to_the_model_before_memory_is_taken():
    receiver = WeightReceiver(most_elements=100)
    receiver._groups["g"] = None  # type: ignore[assignment]  # never reached
    for names, dtypes, shapes in (
        (["a"], ["float32"], [[2**40]]),
        (["a"], ["int64"], [[2]]),
        (["a"], ["nn"], [[2]]),
        (["a", "a"], ["float32"] * 2, [[2], [2]]),
        (["a"], ["float32"], []),
    ):
        with pytest.raises(UserError):
            receiver.receive("g", names, dtypes, shapes)


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
            for i in range(12)
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


@pytest.mark.parametrize(
    "header",
    [None, b"Bearer wrong", b"Bearer", b"", b"key", "Bearer schlüssel".encode(), b"Bearer \xff"],
)
def test_nothing_passes_without_the_key(server, header):
    client = TestClient(server.app("key"), raise_server_exceptions=False)
    headers = {} if header is None else {"Authorization": header}
    for method, path in (("GET", "/model_info"), ("POST", "/generate"), ("POST", "/no_such_path")):
        assert client.request(method, path, headers=headers).status_code == 401
    assert client.get("/health", headers=headers).status_code == 200
    right = {"Authorization": "Bearer key"}
    assert client.get("/model_info", headers=right).status_code == 200


def test_half_a_request_is_not_waited_for(server, monkeypatch):
    monkeypatch.setattr(gate, "HEADER_TIMEOUT_S", 0.3)
    monkeypatch.setattr(gate, "BODY_TIMEOUT_S", 0.3)
    app = server.app()
    running = uvicorn.Server(
        uvicorn.Config(app, http=gate.TimedProtocol, lifespan="off", timeout_keep_alive=1)
    )
    listener = socket.create_server(("127.0.0.1", 0))
    thread = threading.Thread(target=running.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    port = listener.getsockname()[1]
    whole = b"GET /ping HTTP/1.1\r\nHost: x\r\n\r\n"
    for sent, answer in (
        (b"", b""),
        (b"POST /generate HTTP/1.1\r\nHost: x\r\n", b""),
        (b"POST /generate HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\n{", b"HTTP/1.1 408"),
        (whole + b"GET /pi", b"HTTP/1.1 200"),
    ):
        with socket.create_connection(("127.0.0.1", port), timeout=20) as connection:
            connection.sendall(sent)
            found = b""
            while piece := connection.recv(4096):  # until the server closes
                found += piece
            assert found[: len(answer)] == answer and bool(found) == bool(answer)
    running.should_exit = True
    thread.join(10)
