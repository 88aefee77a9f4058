"""The client: retries what may pass, gives up in time, and lets no impossible answer through.

The scripted server stands for a broken remote server; everything else runs on a real one.
"""

from __future__ import annotations

import asyncio
import base64
import dataclasses
import random
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from http_servers import JsonHandler, serving
from rollout_models import logprobs

from megatron_gpc.engines.answers import (
    Generation,
    MalformedAnswer,
    RequestRefused,
    ServerUnavailable,
)
from megatron_gpc.engines.client import SampleRequest, SGLangClient, pack_tensors, retrying
from megatron_gpc.types import Experts

ASKED = SampleRequest([5, 6], {"max_new_tokens": 2}, rid="sample-7")
Reply = tuple[int, Any]
"""Status and body; a str is sent as it is, anything else as JSON."""


def good_answer(tokens: list[int], version: str = "1") -> dict[str, Any]:
    return {
        "text": "",
        "output_ids": tokens,
        "meta_info": {
            "finish_reason": {"type": "length", "length": len(tokens)},
            "weight_version": version,
            "output_token_logprobs": [[-0.5, token, None] for token in tokens],
            "weight_versions": [{"version": version, "start": 0, "end": len(tokens)}],
        },
    }


@contextmanager
def scripted(reply: Callable[[int, Any], Reply]) -> Iterator[tuple[str, list[Any]]]:
    """A server that answers POST number i = 1, 2, ... by reply(i, body); yields url and bodies."""
    bodies: list[Any] = []

    class Handler(JsonHandler):
        def do_POST(self) -> None:
            bodies.append(self.body())
            status, content = reply(len(bodies), bodies[-1])
            self.answer(content, status)

    with serving(Handler) as url:
        yield url, bodies


def call(
    url: str,
    work: Callable[[SGLangClient], Any],
    *,
    timeout_s: float = 20.0,
    retries: int = 0,
    max_in_flight: int = 256,
    **options: Any,
) -> Any:
    async def main() -> Any:
        client = SGLangClient(url, timeout_s=timeout_s, max_in_flight=max_in_flight, **options)
        try:
            async for attempt in retrying(retries):
                with attempt:
                    return await work(client)
        finally:
            await client.close()

    return asyncio.run(main())


async def generate(client: SGLangClient, asked: SampleRequest = ASKED) -> Generation:
    return (await client.generate([asked]))[0]


# ---- a broken server ----


def test_503_is_retried():
    with scripted(lambda i, body: (503, {}) if i == 1 else (200, [good_answer([1, 2])])) as (
        url,
        bodies,
    ):
        before = random.getstate()
        generation = call(url, generate, retries=2)
    assert random.getstate() == before  # checkpoints hold it: a retry must leave no trace
    assert generation.token_ids == (1, 2) and generation.logprobs == (-0.5, -0.5)
    assert generation.finish_reason == "length" and generation.weight_versions == (("1", 0, 2),)
    assert [body["rid"] for body in bodies] == [["sample-7"], ["sample-7"]]
    assert bodies[0]["return_logprob"] is True


def test_an_error_of_the_servers_own_is_reported_after_the_last_retry():
    with (
        scripted(lambda i, body: (500, {"error": {"message": "out of memory"}})) as (url, bodies),
        pytest.raises(ServerUnavailable, match="500 out of memory"),
    ):
        call(url, generate, retries=1)
    assert len(bodies) == 2


def test_a_refused_connection_is_retried_then_reported():
    with scripted(lambda i, body: (200, {})) as (url, _):
        pass  # the port is free again
    started = time.monotonic()
    with pytest.raises(ServerUnavailable, match="ConnectError"):
        call(url, generate, retries=1)
    assert time.monotonic() - started >= 0.2  # there was a pause between the attempts


def test_a_server_that_comes_up_late_is_waited_for():
    with scripted(lambda i, body: (200, {})) as (url, _):
        pass
    with pytest.raises(ServerUnavailable, match="not healthy after 0.3 s"):
        call(url, lambda client: client.wait_until_healthy(0.3))


@pytest.mark.parametrize("status", [400, 404, 422])
def test_4xx_is_not_retried_and_carries_the_servers_words(status):
    with (
        scripted(lambda i, body: (status, {"error": {"message": "no such thing"}})) as (
            url,
            bodies,
        ),
        pytest.raises(RequestRefused, match="no such thing") as refused,
    ):
        call(url, generate, retries=3)
    assert len(bodies) == 1 and refused.value.status == status


def test_a_server_that_never_answers_is_given_up_at_the_deadline():
    release = threading.Event()

    def reply(i: int, body: Any) -> Reply:
        release.wait(10)
        return 200, []

    started = time.monotonic()
    with scripted(reply) as (url, _):
        with pytest.raises(ServerUnavailable, match="no answer within 0.3 s"):
            call(url, generate, timeout_s=0.3)
        release.set()
    assert time.monotonic() - started < 3


def _spoilt(**meta: Any) -> list[Any]:
    answer = good_answer([1, 2])
    answer["meta_info"] |= meta
    return [answer]


@pytest.mark.parametrize(
    ("answer", "problem"),
    [
        ([{"text": "", "output_ids": [1]}], "meta_info"),
        (
            [
                {
                    "text": "",
                    "output_ids": [1],
                    "meta_info": {"finish_reason": {"type": "stop"}, "weight_version": "1"},
                }
            ],
            "output_token_logprobs",
        ),
        (_spoilt(output_token_logprobs=[[-0.5, 1, None]]), "1 log-probs do not belong to 2 tokens"),
        (_spoilt(output_token_logprobs=[[-0.5, 1, None], [-0.5, 3, None]]), "do not belong"),
        (_spoilt(output_token_logprobs=[[-0.5, 1, None], [float("nan"), 2, None]]), "log-prob nan"),
        (_spoilt(output_token_logprobs=[[-0.5, 1, None], [None, 2, None]]), "log-prob None"),
        (_spoilt(output_token_logprobs=[[-0.5, 1, None], [-(10**400), 2, None]]), "log-prob -1000"),
        (_spoilt(output_token_logprobs=[[-0.5, 1, None], [-1e300, 2, None]]), "log-prob -1e.300"),
        (_spoilt(output_token_logprobs=[[0.01, 1, None], [-0.5, 2, None]]), "log-prob 0.01"),
        (_spoilt(finish_reason={"type": "magic"}), "magic"),
        (_spoilt(weight_versions=[{"version": "1", "start": 0, "end": 1}]), "do not cover"),
        (_spoilt(weight_versions=[{"version": "1", "start": 1, "end": 2}]), "do not cover"),
        ([good_answer([])], "no tokens"),
        ([good_answer([1, -1])], "token -1"),
        ([good_answer([1, 2, 3])], "more than the 2 allowed"),
        ([], "expected 1 answers"),
        ({"text": ""}, "expected 1 answers"),
        ("<html>", "not JSON"),
    ],
)
def test_an_impossible_answer_is_asked_for_again_then_refused(answer, problem):
    with (
        scripted(lambda i, body: (200, answer)) as (url, bodies),
        pytest.raises(MalformedAnswer, match=problem) as refused,
    ):
        call(url, generate, retries=1)
    assert len(bodies) == 2
    assert "sample-7" in str(refused.value) or problem == "not JSON"


def test_a_good_answer_after_an_impossible_one_is_taken():
    with scripted(
        lambda i, body: (200, _spoilt(finish_reason=None) if i == 1 else [good_answer([1, 2])])
    ) as (url, _):
        assert call(url, generate, retries=1).token_ids == (1, 2)


MIXTURE = Experts(count=4, topk=2, layers=(0, 2), model_layers=3)
ROUTES = np.array([[[0, 3], [0, 0], [2, 1]]] * 3, dtype="<i4")
"""Of two tokens sent and the first of two made; the layer between has no experts."""


def routed_answer(routes: object) -> dict[str, Any]:
    answer = good_answer([1, 2])
    if routes is not None:
        answer["meta_info"]["routed_experts"] = routes
    return answer


def encoded(routes: np.ndarray) -> str:
    return base64.b64encode(routes.tobytes()).decode()


def test_routes_are_asked_for_and_taken_of_the_layers_that_have_experts():
    asked = dataclasses.replace(ASKED, experts=MIXTURE)
    with scripted(lambda i, body: (200, [routed_answer(encoded(ROUTES))])) as (url, bodies):
        generation = call(url, lambda client: generate(client, asked))
        assert call(url, generate).routes == b"", "nobody asked"
    got = np.frombuffer(generation.routes, dtype="<i2").reshape(3, 2, 2)
    assert (got == ROUTES[:, [0, 2]]).all()
    assert [body.get("return_routed_experts") for body in bodies] == [True, None]


@pytest.mark.parametrize(
    ("routes", "problem"),
    [
        (None, "start SGLang with --enable-return-routed-experts"),
        (7, "start SGLang with --enable-return-routed-experts"),
        ("=", "routed_experts: "),
        ("é", "routed_experts: "),
        ("AAA=", "routed_experts: "),
        (encoded(ROUTES[:2]), "12 numbers, and not 3 x 3 x 2"),
        (encoded(ROUTES + 1), "experts are numbered from 0 to 3"),
        (encoded(ROUTES - 1), "experts are numbered from 0 to 3"),
        (encoded(ROUTES * 0), "an expert comes twice"),
    ],
)
def test_impossible_routes_are_refused(routes, problem):
    asked = dataclasses.replace(ASKED, experts=MIXTURE)
    with (
        scripted(lambda i, body: (200, [routed_answer(routes)])) as (url, _),
        pytest.raises(MalformedAnswer, match=problem),
    ):
        call(url, lambda client: generate(client, asked))


def test_log_probs_of_rounding_above_zero_are_not_impossible():
    answer = good_answer([1, 2])
    answer["meta_info"]["output_token_logprobs"][0][0] = 1e-6
    with scripted(lambda i, body: (200, [answer])) as (url, _):
        assert call(url, generate).logprobs == (1e-6, -0.5)


def test_many_requests_keep_their_order_and_the_bound_on_samples_in_flight():
    lock, now, most = threading.Lock(), 0, 0

    def reply(i: int, body: Any) -> Reply:
        nonlocal now, most
        count = len(body["input_ids"])
        with lock:
            now += count
            most = max(most, now)
        time.sleep(0.02)
        with lock:
            now -= count
        return 200, [good_answer(ids) for ids in body["input_ids"]]

    requests = [SampleRequest([i], {"max_new_tokens": 2}) for i in range(30)]
    with scripted(reply) as (url, bodies):
        generations = call(url, lambda c: c.generate(requests), max_in_flight=8)
    assert [g.token_ids for g in generations] == [(i,) for i in range(30)]
    assert most == 8 and len(bodies) == 15


def test_what_may_be_in_flight_together_goes_in_one_post():
    requests = [SampleRequest([i], {"max_new_tokens": 2}) for i in range(30)]
    with scripted(lambda i, body: (200, [good_answer(ids) for ids in body["input_ids"]])) as (
        url,
        bodies,
    ):
        call(url, lambda client: client.generate(requests), max_in_flight=30)
    assert len(bodies) == 1


def test_an_older_server_without_update_sessions_is_served_all_the_same():
    with scripted(lambda i, body: (404, {"detail": "Not Found"})) as (url, _):
        assert call(url, lambda client: client.begin_weight_update()) is False
        assert call(url, lambda client: client.end_weight_update()) is False


def test_a_failed_update_is_an_error_even_with_status_200():
    with (
        scripted(lambda i, body: (200, {"success": False, "message": "no room"})) as (url, _),
        pytest.raises(RequestRefused, match="no room"),
    ):
        call(url, lambda client: client.update_weights_from_disk("somewhere", "2"))


def test_the_module_does_not_import_torch():
    code = "import sys, megatron_gpc.engines.client; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0


# ---- a real server ----


def test_a_router_is_asked_for_one_sample_a_post_and_gives_the_same(http):
    requests = [SampleRequest([10, 7], {"max_new_tokens": 9, "sampling_seed": i}) for i in range(3)]
    one, other = (
        call(str(http.base_url), lambda client: client.generate(requests), **options)
        for options in ({}, {"batched": False})
    )
    assert [g.token_ids for g in one] == [g.token_ids for g in other]


def test_samples_of_a_real_server_pass_every_check(http, reference_a):
    requests = [
        SampleRequest([10 + i // 4, 7], {"max_new_tokens": 20, "sampling_seed": i})
        for i in range(40)
    ]
    generations = call(str(http.base_url), lambda client: client.generate(requests))
    for request, generation in zip(requests, generations, strict=True):
        assert generation.finish_reason in ("stop", "length")
        torch.testing.assert_close(
            torch.tensor(generation.logprobs),
            logprobs(reference_a, request.input_ids, generation.token_ids),
            atol=5e-5,
            rtol=0,
        )


def test_weights_sent_in_parts_are_the_ones_sampled_from(http, reference_b):
    named = [(name, tensor) for name, tensor in reference_b.state_dict().items()]

    async def work(client: SGLangClient) -> Any:
        assert await client.begin_weight_update() is True
        await client.update_weights_from_tensor([pack_tensors(named[:5])], "part")
        await client.update_weights_from_tensor([pack_tensors(named[5:])], "whole")
        await client.end_weight_update()
        assert (await client.model_info())["weight_version"] == "whole"
        return await generate(client, SampleRequest([5, 6], {"max_new_tokens": 10}))

    generation = call(str(http.base_url), work)
    assert {version for version, _, _ in generation.weight_versions} == {"whole"}
    torch.testing.assert_close(
        torch.tensor(generation.logprobs),
        logprobs(reference_b, [5, 6], generation.token_ids),
        atol=5e-5,
        rtol=0,
    )


def test_a_bad_path_is_refused_and_named(http, tmp_path):
    with pytest.raises(RequestRefused, match="nowhere"):
        call(
            str(http.base_url),
            lambda client: client.update_weights_from_disk(str(tmp_path / "nowhere"), "2"),
            retries=3,
        )


def test_requests_of_a_client_that_gave_up_leave_the_batch(http):
    with pytest.raises(ServerUnavailable, match="no answer within"):
        call(
            str(http.base_url),
            lambda client: client.generate(
                [SampleRequest([5], {"max_new_tokens": 1000, "ignore_eos": True})] * 64
            ),
            timeout_s=0.3,
        )
    deadline = time.monotonic() + 5
    while http.post("/flush_cache").status_code != 200:  # it is refused while anything runs
        assert time.monotonic() < deadline
        time.sleep(0.05)
