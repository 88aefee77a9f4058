"""The campaign: every hostile request of the tables to one embedded server, by outcome.

pytest -s tests/hostile/test_requests.py      prints the table
"""

from __future__ import annotations

import socket
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import suppress

import hostile_requests as hostile
import hostile_weights
import httpx
import pytest
import torch
from hostile_requests import Case
from listening import listening

from megatron_gpc.server.app import Server

pytestmark = pytest.mark.timeout(120)
HANG_S = 10.0
"""Longer than this no refusal may take."""
LARGEST_ERROR = 2000
"""Characters of an answer that refuses."""
OUTCOMES = ("refused as expected", "refused otherwise", "5xx", "wrong accept", "hang")
counts: dict[str, Counter[str]] = defaultdict(Counter)


@pytest.fixture(scope="module")
def port(server: Server) -> Iterator[int]:
    with listening(server.app(hostile.KEY)) as port:
        yield port


@pytest.fixture(scope="module")
def http(port: int) -> Iterator[httpx.Client]:
    with httpx.Client(
        base_url=f"http://127.0.0.1:{port}", trust_env=False, timeout=HANG_S
    ) as client:
        yield client


def send(case: Case, http: httpx.Client) -> tuple[int, str]:
    """(status, body) of the answer."""
    if not case.raw:
        request = http.build_request(
            case.method, "/", content=case.content, headers=list(case.headers)
        )
        request.url = http.base_url.copy_with(raw_path=case.path.encode())
        answer = http.send(request)
        return answer.status_code, answer.text
    address = ("127.0.0.1", http.base_url.port)
    found = b""
    with (
        socket.create_connection(address, timeout=HANG_S) as connection,
        suppress(BrokenPipeError, ConnectionResetError),  # it does not read all of what it refuses
    ):
        with suppress(BrokenPipeError, ConnectionResetError):
            connection.sendall(case.raw)
        while b"\r\n\r\n" not in found and (piece := connection.recv(65536)):
            found += piece
    assert found.startswith(b"HTTP/1.1 "), found[:99]
    return int(found[9:12]), found.decode("latin1")


def outcome(case: Case, http: httpx.Client) -> tuple[str, str]:
    """One of OUTCOMES, and what to say of one that is not the first."""
    try:
        status, text = send(case, http)
    except (httpx.TimeoutException, TimeoutError):
        return "hang", f"no answer in {HANG_S:g} s"
    said = f"{status} {text[:200]}"
    if status >= 500 and status != case.status:
        return "5xx", said
    if status < 400:
        return "wrong accept", said
    right = status == case.status and case.says in text and len(text) <= LARGEST_ERROR
    return (
        "refused as expected" if right and "Traceback" not in text else "refused otherwise"
    ), said


def campaign(cases: list[Case], http: httpx.Client, server: Server) -> None:
    """Send them; the server is then as it was."""
    before = state(server, http)
    problems = []
    for case in cases:
        found, said = outcome(case, http)
        counts[case.kind][found] += 1
        if found != OUTCOMES[0]:
            problems.append(f"{found}: {case}: {said}")
    after = state(server, http)
    assert not problems, "\n" + "\n".join(problems)
    assert after == before


def state(server: Server, http: httpx.Client) -> dict[str, object]:
    """Whatever a refused request must not change."""
    generator = server.generator
    body = {"text": "1+1=", "sampling_params": {"max_new_tokens": 5, "temperature": 0}}
    answer = http.post("/generate", json=body, headers=[hostile.RIGHT])
    key = [hostile.RIGHT]
    return {
        "tokens": answer.json()["output_ids"],
        "health": http.get("/health").status_code,
        "version": http.get("/model_info", headers=key).json()["weight_version"],
        "weights": sum(float(w.double().abs().sum()) for w in generator._model.parameters()),
        "memory": (generator.paused, *generator.released, *generator.load().result(5)),
        "groups": sorted(server.receiver._groups),
    }


SIMPLE: dict[str, Callable[[], Iterator[Case]]] = {
    "sampling": hostile.sampling,
    "bodies": hostile.bodies,
    "fields": lambda: hostile.one_wrong_field("fields", hostile.FIELDS),
    "keys": hostile.keys,
    "headers": hostile.headers,
    "paths": hostile.paths,
    "tensors": hostile_weights.tensors,
}


@pytest.fixture(autouse=True)
def in_update(http: httpx.Client) -> Iterator[None]:
    """Between begin and end, or most of the rest would be refused for that alone."""
    http.post("/begin_weight_update", headers=[hostile.RIGHT]).raise_for_status()
    yield
    http.post("/end_weight_update", headers=[hostile.RIGHT]).raise_for_status()


@pytest.mark.parametrize("kind", SIMPLE)
def test_what_is_wrong_is_refused(kind, server, http):
    campaign(list(SIMPLE[kind]()), http, server)


def test_a_folder_that_is_no_model_is_refused(server, http, tmp_path):
    campaign(list(hostile_weights.folders(tmp_path)), http, server)
    assert not (tmp_path / "mark").exists()


def test_a_pickle_runs_nothing_and_takes_no_memory(server, http, tmp_path):
    mark = tmp_path / "mark"
    campaign(list(hostile_weights.pickles(mark)), http, server)
    assert not mark.exists()
    for spoiled in (torch._utils._rebuild_tensor_v2, dict):
        assert not hasattr(spoiled, "spoil")


def test_a_group_takes_nothing_that_the_model_does_not_have(server, http):
    server.receiver._groups["hostile"] = None  # type: ignore[assignment]  # never reached
    cases = [*hostile.one_wrong_field("groups", hostile.GROUPS), *hostile.groups_joined("hostile")]
    campaign(cases, http, server)
    del server.receiver._groups["hostile"]


def test_the_figures():
    """Last: what came of them all."""
    total = sum(counts.values(), Counter())
    print("\n" + table())
    assert total.total() >= 372 and not set(total) - {OUTCOMES[0]}


def table() -> str:
    rows = [*sorted(counts.items()), ("all", sum(counts.values(), Counter()))]
    lines = ["kind".ljust(10) + "requests".rjust(10) + "".join(o.rjust(22) for o in OUTCOMES)]
    lines += [
        kind.ljust(10) + f"{found.total():10}" + "".join(f"{found[o]:22}" for o in OUTCOMES)
        for kind, found in rows
    ]
    return "\n".join(lines)
