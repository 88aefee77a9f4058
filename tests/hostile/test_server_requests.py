"""What the careless and the hostile send to the embedded server: 4xx, in time, and it goes on.

One server in this process; `raise_server_exceptions=False` shows what the network would.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from rollout_models import build_model
from starlette.testclient import TestClient

from megatron_gpc.rollout.tokenizer import decoder, load_tokenizer
from megatron_gpc.server import sampling
from megatron_gpc.server.app import Server
from megatron_gpc.server.generator import Generator

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
    import json

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
    import threading

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
