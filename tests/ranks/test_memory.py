"""The doctor's estimate of memory against what torch allocates."""

from __future__ import annotations

from typing import Any

import memory_ranks
import pytest
import torch
from tiny import run_config

from megatron_gpc import kernels
from megatron_gpc.doctor.memory import estimate, head_bytes
from megatron_gpc.kernels.head import head_stats

RECOMPUTE = [
    f"megatron.transformer.recompute_{key}"
    for key in ("granularity=full", "method=uniform", "num_layers=1")
]
LOGITS = ["train.head=logits"]


@pytest.mark.parametrize(
    ("hidden", "overrides"),
    [
        (128, [*LOGITS, "train.logit_chunk_tokens=64"]),  # the backward of log-prob is the peak
        (512, [*LOGITS, "train.logit_chunk_tokens=64"]),  # the gradient of the LM head
        (128, [*LOGITS, "train.logit_chunk_tokens=64", "model.dtype=float32"]),
        (128, ["train.head=auto"]),  # keeps them here
    ],
    ids=str,
)
def test_with_recomputation_the_estimate_is_what_torch_allocates(pool, tmp_path, hidden, overrides):
    """Without, layers keep more on a CPU than where their parts are fused."""
    hf = {
        **{"model_type": "qwen2", "vocab_size": 8192, "hidden_size": hidden},
        **{"intermediate_size": 2 * hidden, "num_hidden_layers": 4},
        **{"num_attention_heads": 4, "num_key_value_heads": 2, "hidden_act": "silu"},
        **{"max_position_embeddings": 4096, "rms_norm_eps": 1e-6, "rope_theta": 1e6},
        "tie_word_embeddings": True,
    }
    config = run_config(
        *(tmp_path, tmp_path, "model.dtype=bfloat16", "rollout.max_response_tokens=64"),
        *("train.micro_batch_size=16", "train.micro_batch_tokens=2048", *RECOMPUTE, *overrides),
    )
    (peak,) = pool(1).run(memory_ranks.peak_of_training, config, hf)
    assert estimate(config, hf, 1).trainer == pytest.approx(peak, rel=0.09)


@pytest.mark.parametrize(("head", "rows", "vocab"), [("auto", 1024, 8192), ("fused", 4096, 32768)])
def test_the_estimate_of_the_head_is_what_it_allocates(monkeypatch, tmp_path, head, rows, vocab):
    monkeypatch.setitem(kernels.CHUNK_LOGITS, "cuda", kernels.CHUNK_LOGITS["cpu"])
    config = run_config(
        *(tmp_path, tmp_path, "model.dtype=bfloat16", f"train.head={head}"),
        *("train.micro_batch_size=4", f"rollout.max_response_tokens={rows // 4}"),
    )
    targets_T = torch.zeros(rows, dtype=torch.int64)
    with memory_ranks.Live() as live:
        hidden_TD = torch.zeros(rows, 64, dtype=torch.bfloat16, requires_grad=True)
        weight_VD: Any = torch.zeros(vocab, 64, dtype=torch.bfloat16, requires_grad=True)
        weight_VD.main_grad = torch.zeros(vocab, 64)
        there, keep = live.bytes, head == "auto"
        stats = head_stats(hidden_TD, weight_VD, targets_T, vocab_size=vocab, keep_logits=keep)
        stats.logp_T.sum().backward()
    assert head_bytes(config, vocab, 64) == pytest.approx(live.peak - there, rel=0.15)
