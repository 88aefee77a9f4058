"""Engines that a run has started itself."""

from __future__ import annotations

import time
from pathlib import Path

import httpx
import pytest
from rollout_models import build_model

from megatron_gpc.config import ServerConfig, SGLangConfig
from megatron_gpc.engines.answers import RolloutError
from megatron_gpc.engines.fleet import Fleet
from megatron_gpc.engines.starter import Starter

pytestmark = pytest.mark.timeout(120)


def test_an_engine_that_lives_and_is_not_healthy_is_started_again(tmp_path: Path):
    model = build_model(tmp_path / "model", seed=0)
    starter = Starter(ServerConfig(), SGLangConfig(), model, tmp_path / "logs", with_key=False)
    with Fleet(starter) as fleet:
        assert fleet.await_started()
        (engine,) = fleet.engines
        first = engine.process
        assert first is not None
        fleet.current = (str(model), "7")
        paused = httpx.post(f"{engine.url}/pause_generation", json={"mode": "abort"})
        assert paused.is_success  # it answers, and is not healthy
        engine.fail(RolloutError("it did not answer"))
        deadline = time.monotonic() + 60
        while engine.state != "ready":
            assert time.monotonic() < deadline, engine.problem
            time.sleep(0.05)
        assert engine.process is not None and engine.process.pid != first.pid
        assert not first.alive() and fleet.counts["faults_restarts"] == 1
        assert fleet.run(engine.client.model_info())["weight_version"] == "7"
