"""Engines that a run has started itself."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from rollout_models import build_model

from megatron_gpc.config import ServerConfig, SGLangConfig
from megatron_gpc.engines.answers import MalformedAnswer, RolloutError
from megatron_gpc.engines.client import SampleRequest
from megatron_gpc.engines.fleet import Fleet, name_of, version_of
from megatron_gpc.engines.starter import Starter
from megatron_gpc.engines.weight_sync import read_folder

pytestmark = pytest.mark.timeout(120)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("models")
    return [build_model(folder / str(seed), seed=seed) for seed in (0, 1)]


@pytest.fixture(scope="module")
def fleet(models: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    logs = tmp_path_factory.mktemp("logs")
    with Fleet(Starter(ServerConfig(retries=0), SGLangConfig(), models[0], logs)) as fleet:
        assert fleet.await_started()
        yield fleet


ASKED = [SampleRequest([5, 6], {"max_new_tokens": 6, "temperature": 0, "ignore_eos": True})]


@pytest.mark.parametrize("their_name", ["the same", "the same number", "none"])
def test_weights_that_someone_else_loads_are_noticed_whatever_their_name(fleet, models, their_name):
    """Between the probe and the samples; the engine then reads the run's own weights again."""
    read_folder(fleet, models[0], name_of("3"))
    (ours,) = fleet.run(fleet.generate(ASKED))
    assert ours.weight_versions == (("3", 0, 6),)
    (engine,) = fleet.engines
    name = {"the same": fleet.weights, "the same number": "3", "none": None}[their_name]
    theirs = {"model_path": str(models[1]), "weight_version": name}
    fleet.run(engine.client._post("/update_weights_from_disk", theirs))
    with pytest.raises(MalformedAnswer, match="does someone else use this server"):
        fleet.run(fleet.generate(ASKED))
    (again,) = fleet.run(fleet.generate(ASKED))
    assert again.token_ids == ours.token_ids and again.logprobs == ours.logprobs
    assert again.weight_versions == ours.weight_versions


def test_no_two_hand_overs_have_a_name():
    assert name_of("3") != name_of("3") and version_of(name_of("a~3")) == "a~3"


def test_an_engine_that_lives_and_is_not_healthy_is_started_again(tmp_path: Path):
    model = build_model(tmp_path / "model", seed=0)
    starter = Starter(ServerConfig(), SGLangConfig(), model, tmp_path / "logs")
    with Fleet(starter) as fleet:
        assert fleet.await_started()
        (engine,) = fleet.engines
        first = engine.process
        assert first is not None
        fleet.current = (str(model), "7")
        fleet.run(engine.client._post("/pause_generation", {"mode": "abort"}))
        # it answers, and is not healthy
        engine.fail(RolloutError("it did not answer"))
        deadline = time.monotonic() + 60
        while engine.state != "ready":
            assert time.monotonic() < deadline, engine.problem
            time.sleep(0.05)
        assert engine.process is not None and engine.process.pid != first.pid
        assert not first.alive() and fleet.counts["faults_restarts"] == 1
        assert fleet.run(engine.client.model_info())["weight_version"] == "7"
