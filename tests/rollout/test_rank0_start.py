"""What rank 0 says where a run cannot start; nothing is left running or locked."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from damage import cut
from tiny import run_config

from megatron_gpc.config import Config
from megatron_gpc.engines.answers import RolloutError
from megatron_gpc.errors import UserError
from megatron_gpc.rank0 import Rank0
from megatron_gpc.rollout.tokenizer import load_tokenizer
from megatron_gpc.types import TrainState
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
        Rank0(config(), active=True).__enter__()


def test_damaged_weights_are_named_before_a_server_is_started_on_them(model, config, tmp_path):
    cut(model / SINGLE, 20_000)
    with pytest.raises(UserError, match=f"{model / SINGLE}: truncated"):
        Rank0(config(), active=True).__enter__()
    assert not (tmp_path / "run" / "logs").exists()


def test_a_server_that_does_not_start_is_no_error_of_the_user(config):
    slow = config("rollout.server.start_timeout_s=0.1")
    for _ in range(2):  # the second time the run's folder is free again
        with (
            Rank0(slow, active=True) as rank0,
            pytest.raises(RolloutError, match="not up after 0.1 s"),
        ):
            rank0.begin(TrainState())
