"""Tiny models, and the server that the contract tests talk to.

That is the embedded server, and with `make test-sglang` the real SGLang.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import sglang_cpu
from rollout_models import CONTEXT, EOS, VOCAB, build_model
from tiny import byte_tokenizer
from tiny_models import make_model
from transformers import Qwen2ForCausalLM

from megatron_gpc.engines.process import EmbeddedServer


@pytest.fixture(scope="session")
def model_a(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_model(tmp_path_factory.mktemp("model") / "a", seed=0)


@pytest.fixture(scope="session")
def model_b(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Other weights in the shapes of model_a."""
    return build_model(tmp_path_factory.mktemp("model") / "b", seed=1)


@pytest.fixture(scope="session")
def model_tied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_model(tmp_path_factory.mktemp("model") / "tied", seed=2, tied=True)


@pytest.fixture(scope="session")
def model_moe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Qwen3-MoE whose second layer has no experts, with model_a's vocabulary."""
    folder = tmp_path_factory.mktemp("model") / "moe"
    layers = {"num_hidden_layers": 3, "mlp_only_layers": [1]}
    tokens = {"vocab_size": VOCAB, "eos_token_id": EOS, "pad_token_id": 256}
    model = make_model("qwen3_moe", max_position_embeddings=CONTEXT, **layers, **tokens)
    model.save_pretrained(folder)
    return byte_tokenizer(folder, "<pad>", "<eos>", eos_token="<eos>", pad_token="<pad>")


@pytest.fixture(scope="session")
def reference_a(model_a: Path) -> Qwen2ForCausalLM:
    return Qwen2ForCausalLM.from_pretrained(model_a).eval()


@pytest.fixture(scope="session")
def reference_b(model_b: Path) -> Qwen2ForCausalLM:
    return Qwen2ForCausalLM.from_pretrained(model_b).eval()


@pytest.fixture(scope="session")
def server_url(model_a: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    log = tmp_path_factory.mktemp("server") / "server.log"
    if sglang_cpu.PYTHON is None:
        server = EmbeddedServer(model_a, log, start_timeout_s=60)
    else:
        server = sglang_cpu.server(model_a, log)
    with server:
        yield server.url


@pytest.fixture
def http(server_url: str, model_a: Path) -> Iterator[httpx.Client]:
    """A plain HTTP client; afterwards the server is idle, running and has model_a's weights."""
    with httpx.Client(base_url=server_url, timeout=240, trust_env=False) as client:
        yield client
        client.post("/abort_request", json={"abort_all": True})
        client.post("/continue_generation", json={})
        client.post(
            "/update_weights_from_disk",
            json={"model_path": str(model_a), "weight_version": "default"},
        )
