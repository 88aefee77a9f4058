"""How far an engine's log-probs may be from the trainer's."""

from __future__ import annotations

import json
import math

import pytest
from tiny import run_config

from megatron_gpc.engines.probe import Tolerance


def test_log_probs_are_held_to_the_mean_and_a_loose_maximum():
    tolerance = Tolerance(mean=0.1, largest=5.0)
    assert not tolerance.problem([0.03] * 255 + [1.5]), "as bf16's first tokens are"
    assert "0.11 on average" in tolerance.problem([0.11] * 256)
    assert "up to 6" in tolerance.problem([0.0] * 255 + [6.0])
    assert tolerance.problem([math.nan, 0.0]) and tolerance.problem([0.0, math.nan])
    assert tolerance.problem([])


@pytest.mark.parametrize(
    ("overrides", "mean"),
    [
        ((), 1e-3),
        (("model.dtype=bfloat16",), 0.1),
        (("rollout.server.kind=sglang",), 0.1),  # which would take 16 bits
        (("rollout.server.kind=sglang", "sglang.args.dtype=float32"), 1e-3),
        (("rollout.server.urls=http://elsewhere:1",), 0.1),
        (("rollout.server.probe_tolerance=0.02",), 0.02),
    ],
    ids=str,
)
def test_the_tolerance_follows_from_what_both_sides_compute_in(tmp_path, model_a, overrides, mean):
    assert Tolerance.of(run_config(tmp_path, model_a, *overrides)).mean == mean


@pytest.mark.parametrize("spelling", ["dtype", "torch_dtype"])
def test_a_checkpoint_of_16_bits_makes_an_embedded_server_of_16_bits(tmp_path, model_a, spelling):
    hf = tmp_path / "hf"
    hf.mkdir()
    content = json.loads((model_a / "config.json").read_text())
    del content["dtype"]
    for dtype, mean in (("bfloat16", 0.1), ("float32", 1e-3)):
        (hf / "config.json").write_text(json.dumps({**content, spelling: dtype}))
        assert Tolerance.of(run_config(tmp_path, hf)).mean == mean
