"""What changes no bit, and what has bf16's precision only."""

from __future__ import annotations

from dataclasses import replace

import pytest
import ranks
import torch
from layouts import CP2, ONE, PP2, SP, TP2, VPP2, Layout, differences, measure
from safetensors.torch import load_file
from tiny import run_config

RECOMPUTED = {
    "full": ("full", "recompute_method=uniform", "recompute_num_layers=1"),
    "selective": ("selective",),
}
PP4 = "parallel.pp=4"
EVERYTHING = Layout(4, (TP2, PP2, VPP2, SP))


@pytest.mark.parametrize(
    "layout",
    [
        Layout(1),
        pytest.param(replace(EVERYTHING, models=("tied", "moe")), marks=pytest.mark.slow),
        pytest.param(Layout(2, (CP2,), ("qk-norm", "moe")), marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_recomputed_activations_change_no_bit(problems, pool, tmp_path, layout):
    kept, *recomputed = (
        measure(
            pool,
            layout,
            problems,
            tmp_path,
            *(f"megatron.transformer.{override}" for override in overrides),
        )
        for overrides in [
            (),
            *((f"recompute_granularity={first}", *rest) for first, *rest in RECOMPUTED.values()),
        ]
    )
    for results in recomputed:
        for name in layout.models:
            got, want = results[0][name], kept[0][name]
            assert got["attention_calls"] == 2 * want["attention_calls"]
            assert all(torch.equal(got["after"][n], w) for n, w in want["after"].items()), name
            assert (got["loss"], got["grad_norm"]) == (want["loss"], want["grad_norm"])


@pytest.mark.parametrize(
    "layout",
    [ONE, pytest.param(replace(EVERYTHING, models=("moe",)), marks=pytest.mark.slow)],
    ids=str,
)
def test_the_order_of_micro_batches_is_of_no_account(problems, references, pool, tmp_path, layout):
    run = ranks.score_and_update_in_reverse
    overrides = ("train.micro_batch_size=1",)
    results = measure(pool, layout, problems, tmp_path, *overrides, run=run)
    for name in layout.models:
        slots = range(len(references[name].logp_T))
        found = differences([result[name] for result in results], references[name], slots)
        assert found.within_tolerance(), (name, found)


@pytest.mark.parametrize(
    "layout", [Layout(1), Layout(4, ("parallel.tp=4",)), EVERYTHING, Layout(4, (PP4,))], ids=str
)
@pytest.mark.parametrize("name", ["dense", "tied"])
def test_weights_come_back_as_the_hugging_face_bytes(problems, pool, tmp_path, layout, name):
    hf = problems[name].hf
    config = run_config(tmp_path, hf, *layout.overrides)
    exported = pool(layout.world).run(ranks.export, config)
    want = load_file(hf / "model.safetensors")
    assert exported[0].keys() == want.keys() and all(not other for other in exported[1:])
    for key, tensor in want.items():
        assert torch.equal(exported[0][key], tensor), key


def test_bf16_weights_keep_fp32_statistics_and_agree_within_bf16_rounding(
    problems, references, pool, tmp_path
):
    """Log-probs are computed in fp32 from bf16 logits: 8 bits of mantissa at |logit| up to 8."""
    layout = Layout(4, (TP2, PP2), ("dense",))
    result = measure(pool, layout, problems, tmp_path, "model.dtype=bfloat16")[0]["dense"]
    reference = references["dense"]
    assert result["scored"].logp_T.dtype == torch.float32
    assert (result["scored"].logp_T - reference.logp_T).abs().mean() < 0.1
    assert result["grad_norm"] == pytest.approx(reference.grad_norm, rel=0.2)
