"""Optimizer state, fp32 weights and gradients leave the GPU and come back to the bit."""

from __future__ import annotations

import pytest
from layouts import DP2, REPLICATED, TP2, Layout
from test_offload import hold_to_each_other
from tiny import run_config, tiny_qwen2

WIDE = {"hidden_size": 256, "intermediate_size": 512}


@pytest.mark.parametrize(
    "layout",
    [
        Layout(1, ("model.dtype=bfloat16",)),
        Layout(2, (DP2, "model.dtype=bfloat16")),
        Layout(2, (DP2, REPLICATED)),
        Layout(2, (TP2,)),
    ],
    ids=str,
)
def test_updates_are_those_without_offloading_and_memory_is_free_meanwhile(
    gpu_pool, tmp_path, layout
):
    hf = tiny_qwen2(tmp_path / "hf", **WIDE)
    config = run_config(tmp_path, hf, *layout.overrides)
    hold_to_each_other(gpu_pool(layout.world), config, parameters=1_000_000)
