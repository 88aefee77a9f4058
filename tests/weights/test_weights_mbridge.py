"""An independent converter, mbridge, makes the same Megatron tensors and the same cuts.

Runs where mbridge can be imported: `pip install --no-deps mbridge einops`.
"""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest
import torch
import transformers
from tiny_models import Checkpoint, Checkpoints

from megatron_gpc.mcore import cpu
from megatron_gpc.weights import family_of, shard, to_hf, to_megatron, unshard

if importlib.util.find_spec("mbridge") is None or importlib.util.find_spec("einops") is None:
    pytest.skip("mbridge is not installed", allow_module_level=True)
cpu.install()

# mbridge knows no dense layers in a mixture of experts, and names experts as grouped GEMM does
NAMES = [
    "qwen2-untied",
    "qwen2-tied",
    "qwen2-one-kv-head",
    "qwen3",
    "qwen3-tied",
    "qwen3_moe",
    "qwen2_moe",
]


def bridge_for(checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> Any:
    from mbridge.core.bridge import _MODEL_REGISTRY
    from mbridge.core.parallel_states import ParallelStates

    kind = _MODEL_REGISTRY[checkpoint.config["model_type"]]
    # a tied model changes this mapping for every later one
    monkeypatch.setattr(kind, "_DIRECT_MAPPING", dict(kind._DIRECT_MAPPING))
    bridge = kind(
        transformers.AutoConfig.from_pretrained(checkpoint.folder),
        torch.float32,
        ParallelStates(vpp_size=None),
        make_vocab_size_divisible_by=128,
    )
    bridge.vocab_size = checkpoint.config["vocab_size"]
    bridge.padded_vocab_size = -(-bridge.vocab_size // 128) * 128
    return bridge


def their_name(megatron: str) -> str:
    """local_experts.5.linear_fc1.weight -> linear_fc1.weight5."""
    if ".local_experts." not in megatron:
        return megatron
    before, after = megatron.split(".local_experts.")
    expert, rest = after.split(".", 1)
    return f"{before}.{rest}{expert}"


@pytest.mark.parametrize("name", NAMES)
def test_names_tensors_and_cuts_agree_with_mbridge(
    name: str, checkpoints: Checkpoints, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = checkpoints[name]
    bridge = bridge_for(checkpoint, monkeypatch)
    tensors = checkpoint.tensors()
    params = family_of(checkpoint.config).params(checkpoint.config)
    assert len(params) > 10
    for param in params:
        theirs = their_name(param.megatron)
        assert tuple(bridge._weight_name_mapping_mcore_to_hf(theirs)) == param.hf
        parts = [tensors[hf] for hf in param.hf]
        whole = to_megatron(param, parts)
        assert torch.equal(bridge._weight_to_mcore_format(theirs, parts), whole), param.megatron
        _, back = bridge._weight_to_hf_format(theirs, whole)
        for mine, other in zip(to_hf(param, whole), back, strict=True):
            assert torch.equal(mine, other), param.megatron
        for tp in (2, 4):
            mine = [shard(param, whole, rank, tp) for rank in range(tp)]
            cuts = bridge._weight_split_across_tp(theirs, whole, mine[0], tp)
            for rank in range(tp):
                assert torch.equal(mine[rank], cuts[rank]), (param.megatron, tp, rank)
            if param.split_dim is not None:
                bridge.mpu.tp_size = bridge.mpu.etp_size = tp
                mine[0].tensor_model_parallel, mine[0].partition_dim = True, param.split_dim
                joined = bridge._weight_merge_across_tp(theirs, cuts, mine[0])
                assert torch.equal(joined, unshard(param, mine)), (param.megatron, tp)
