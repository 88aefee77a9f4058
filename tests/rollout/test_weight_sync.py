"""What the ways of handing over weights send to servers of several ranks."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from http_servers import JsonHandler, serving
from tiny import run_config

from megatron_gpc.engines.fleet import Fleet
from megatron_gpc.engines.starter import Starter
from megatron_gpc.engines.weight_sync import TensorSync
from megatron_gpc.server.loading import unpack_tensors


@contextmanager
def server_of_ranks(tp_size: int) -> Iterator[tuple[str, list[list[str]]]]:
    """Takes weights as SGLang does: each rank reads the part of its own number; yields address and
    the parts of every request."""
    parts: list[list[str]] = []
    version = ["0"]

    class Handler(JsonHandler):
        def do_GET(self) -> None:
            self.answer({"tp_size": tp_size, "weight_version": version[0]})

        def do_POST(self) -> None:
            body = self.body()
            if self.path == "/update_weights_from_tensor":
                parts.append([body["serialized_named_tensors"][rank] for rank in range(tp_size)])
                version[0] = body["weight_version"]
            self.answer({"success": True})

    with serving(Handler) as url:
        yield url, parts


def test_every_rank_of_every_engine_finds_all_tensors(tmp_path: Path):
    config = run_config(tmp_path, tmp_path)
    with server_of_ranks(1) as (one, to_one), server_of_ranks(2) as (two, to_two):
        server = dataclasses.replace(config.rollout.server, urls=(one, two))
        with Fleet(Starter(server, config.sglang, tmp_path, tmp_path)) as fleet:
            fleet.await_started()
            named = [(name, torch.randn(1024, 256)) for name in "ab"]  # 1 MiB each
            TensorSync(fleet, 2**20).push(named, "7")
            assert [engine.state for engine in fleet.engines] == ["ready", "ready"]
    assert [len(parts) for parts in to_one] == [1, 1] and [len(p) for p in to_two] == [2, 2]
    for (packed,), of_two, (name, tensor) in zip(to_one, to_two, named, strict=True):
        assert of_two == [packed, packed]
        ((found, value),) = unpack_tensors(packed)
        assert found == name and torch.equal(value, tensor)
