"""What sync=tensor sends to servers of several ranks, near and far, and what it leaves behind."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from http_servers import JsonHandler, serving
from tiny import run_config

from megatron_gpc.engines.fleet import Fleet
from megatron_gpc.engines.starter import Starter
from megatron_gpc.engines.weight_sync import TensorSync
from megatron_gpc.run.network import is_here, own_address
from megatron_gpc.server.loading import unpack_tensors
from megatron_gpc.weights.handles import FORMAT, Named, unpack

NAMED = [(name, torch.randn(1024, 256)) for name in "abc"]  # 1 MiB each


@dataclasses.dataclass
class Taken:
    """What a server got in a request."""

    of_rank: list[list[Named]]
    size: int
    """Of the request [bytes]."""


@contextmanager
def server_of_ranks(
    tp_size: int, fails: Callable[[], bool] = lambda: False
) -> Iterator[tuple[str, list[Taken]]]:
    """Takes weights as SGLang does: each rank reads the part of its own number, while it is asked;
    yields address and what it took."""
    taken: list[Taken] = []
    version = ["0"]

    class Handler(JsonHandler):
        def do_GET(self) -> None:
            self.answer({"tp_size": tp_size, "weight_version": version[0]})

        def do_POST(self) -> None:
            body = self.body()
            if self.path == "/update_weights_from_tensor":
                if fails():
                    self.answer({"error": "out of order"}, 503)
                    return
                take: Any = unpack if body.get("load_format") == FORMAT else unpack_tensors
                parts = [body["serialized_named_tensors"][rank] for rank in range(tp_size)]
                read = [[(n, t.clone()) for n, t in take(part)] for part in parts]
                taken.append(Taken(read, int(self.headers["Content-Length"])))
                version[0] = body["weight_version"]
            self.answer({"success": True})

    with serving(Handler) as url:
        yield url, taken


@pytest.fixture
def fleet_of(tmp_path: Path) -> Iterator[Callable[..., Fleet]]:
    """Engines at addresses, which are up."""
    with ExitStack() as stack:

        def make(*urls: str, **options: Any) -> Fleet:
            config = run_config(tmp_path, tmp_path)
            server = dataclasses.replace(config.rollout.server, urls=urls, **options)
            fleet = stack.enter_context(Fleet(Starter(server, config.sglang, tmp_path, tmp_path)))
            fleet.await_started()
            return fleet

        yield make


def shared() -> set[str]:
    return {file.name for file in Path("/dev/shm").glob("torch_*")}


def equal(found: list[Named], sent: list[Named]) -> bool:
    return all(n == m and torch.equal(t, u) for (n, t), (m, u) in zip(found, sent, strict=True))


def test_every_rank_reads_all_tensors_in_place_and_only_names_travel(fleet_of):
    with server_of_ranks(1) as (one, by_one), server_of_ranks(2) as (two, by_two):
        fleet, before = fleet_of(one, two), shared()
        sync = TensorSync(fleet, 2**20)
        for again in range(2):
            sync.push(NAMED, f"{again}")
        assert [engine.state for engine in fleet.engines] == ["ready", "ready"]
        assert len(shared() - before) == 2, "two pieces of memory are kept"
        sync.close()
        assert shared() == before
    for taken, ranks in ((by_one, 1), (by_two, 2)):
        assert [len(one.of_rank) for one in taken] == [ranks] * 6
        assert max(one.size for one in taken) < 1000 * (ranks + 1)
        for number, one in enumerate(taken):
            assert all(equal(found, [NAMED[number % 3]]) for found in one.of_rank)


def test_an_engine_of_another_host_gets_the_numbers_themselves_and_that_is_said(fleet_of, capsys):
    with server_of_ranks(2) as (far, by_far), server_of_ranks(1) as (near, by_near):
        fleet = fleet_of(far, near)
        assert [engine.reads for engine in fleet.engines] == ["host", "host"]
        fleet.engines[0].reads = "requests"
        sync = TensorSync(fleet, 2**20)
        for again in range(2):
            sync.push(NAMED, f"{again}")
        assert [engine.state for engine in fleet.engines] == ["ready", "ready"]
        sync.close()
    said = capsys.readouterr().err
    assert said.count("is not on this host") == 1 and far in said and near not in said
    for number, one in enumerate(by_far[:3]):
        assert one.size > 2 * 2**20
        assert all(equal(found, [NAMED[number]]) for found in one.of_rank)
    assert all(one.size < 2000 for one in by_near)


def test_nothing_is_left_of_a_hand_over_that_an_engine_fails(fleet_of):
    asked = []
    fails = lambda: asked.append(1) or len(asked) > 1  # noqa: E731
    with server_of_ranks(1, fails) as (bad, _), server_of_ranks(1) as (good, by_good):
        fleet, before = fleet_of(bad, good, retries=0), shared()
        TensorSync(fleet, 2**20).push(NAMED, "7")
        assert [engine.state for engine in fleet.engines] == ["down", "ready"]
        assert shared() == before
    assert all(equal(one.of_rank[0], [named]) for one, named in zip(by_good, NAMED, strict=True))


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "::1", own_address()])
def test_this_host_knows_its_own_names(host):
    assert is_here(host)


@pytest.mark.parametrize("host", ["192.0.2.1", "no-such-host.invalid", "", "a b", "a..b"])
def test_other_hosts_are_not_this_one(host):
    assert not is_here(host)
