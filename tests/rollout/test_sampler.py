"""What a sampler says if it cannot start, and what is left to train on."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest
from damage import cut
from tiny import run_config

from megatron_gpc.config import Config
from megatron_gpc.engines.answers import RolloutError
from megatron_gpc.errors import UserError
from megatron_gpc.rollout.sampler import sampler_of, trained_on
from megatron_gpc.rollout.tokenizer import load_tokenizer
from megatron_gpc.types import Prompt, Sample
from megatron_gpc.weights.hf_files import SINGLE


@pytest.fixture
def model(model_a: Path, tmp_path: Path) -> Path:
    return shutil.copytree(model_a, tmp_path / "model")


@pytest.fixture
def config(model: Path, tmp_path: Path) -> Callable[..., Config]:
    (tmp_path / "prompts.jsonl").write_text(json.dumps({"prompt": "500=", "label": 500}) + "\n")
    (tmp_path / "run").mkdir()
    return lambda *overrides: run_config(tmp_path, model, *overrides)


def test_a_tokenizer_that_is_absent_or_damaged_is_blamed_on_the_model_folder(model, config):
    assert len(load_tokenizer(model)("500=")["input_ids"]) == 4
    (model / "tokenizer.json").write_text('{"version": "1.0"}')
    with pytest.raises(UserError, match=f"{model}: cannot load the tokenizer"):
        load_tokenizer(model)
    for file in model.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(UserError, match=f"{model} has no tokenizer"):
        sampler_of(config()).__enter__()


def test_damaged_weights_are_named_before_a_server_is_started_on_them(model, config, tmp_path):
    cut(model / SINGLE, 20_000)
    with pytest.raises(UserError, match=f"{model / SINGLE}: truncated"):
        sampler_of(config()).__enter__()
    assert not (tmp_path / "run" / "logs").exists()


def test_a_server_that_does_not_start_is_no_error_of_the_user(config):
    slow = config("rollout.server.start_timeout_s=0.1")
    with pytest.raises(RolloutError, match="not up after 0.1 s"):
        sampler_of(slow).__enter__()


def test_engines_are_up_once_there_is_a_sampler_for_then_the_policy_takes_its_memory(config):
    with sampler_of(config("rollout.server.engines=2")) as sampler:
        for engine in sampler.fleet.engines:
            assert httpx.get(f"{engine.url}/health", trust_env=False).status_code == 200


def test_what_is_cut_is_dropped_and_a_step_of_nothing_else_is_told(config):
    prompt = Prompt(0, "500=", (1,), 500)
    ends = ("length", "stop", "length")
    samples = [Sample(prompt, n, (1,), (-1.0,), "", end, ()) for n, end in enumerate(ends)]
    said: list[str] = []
    drop, keep = config("rollout.overlong=drop").rollout, config().rollout
    assert trained_on(samples, keep, 1, said.append) == [0, 1, 2]
    assert trained_on(samples, drop, 1, said.append) == [1] and said == []
    assert trained_on(samples[::2], drop, 7, said.append) == []
    assert len(said) == 1 and "step 7: every response was cut" in said[0]
