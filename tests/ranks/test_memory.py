"""The doctor's estimate of memory against what torch allocates."""

from __future__ import annotations

import memory_ranks
import pytest
from tiny import run_config

from megatron_gpc.doctor.memory import estimate

RECOMPUTE = [
    f"megatron.transformer.recompute_{key}"
    for key in ("granularity=full", "method=uniform", "num_layers=1")
]


@pytest.mark.parametrize(
    ("hidden", "overrides"),
    [
        (128, ["train.logit_chunk_tokens=64"]),  # the backward of log-prob is the peak
        (128, ["train.logit_chunk_tokens=1024"]),  # its forward
        (512, ["train.logit_chunk_tokens=64"]),  # the gradient of the LM head
        (128, ["train.logit_chunk_tokens=64", "model.dtype=float32"]),
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
