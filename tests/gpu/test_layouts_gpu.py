"""Layouts on GPUs: in fp32 to the tolerances of tests/ranks, in bf16 with transformer-engine."""

from __future__ import annotations

import pytest
from layouts import CP2, LAYOUTS, PP2, SP, TP2, Layout, hold_to, measure

# transformer-engine wants heads of at least 8
WIDE = ("qk-norm", "moe")


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_every_layout_gives_the_numbers_of_float64(
    problems, references, gpu_pool, tmp_path, layout
):
    results = measure(gpu_pool, layout, problems, tmp_path)
    for name in layout.models:
        of_ranks, reference = [result[name] for result in results], references[name]
        slots = range(len(reference.logp_T))
        hold_to(reference, of_ranks, slots, name)


@pytest.mark.parametrize(
    "layout",
    [Layout(1, models=WIDE), Layout(2, (CP2,), WIDE), Layout(4, (TP2, PP2, SP), WIDE)],
    ids=str,
)
def test_transformer_engine_keeps_packed_sequences_apart(
    problems, references, gpu_pool, tmp_path, layout
):
    pytest.importorskip("transformer_engine")
    results = measure(gpu_pool, layout, problems, tmp_path, "model.dtype=bfloat16")
    for name in layout.models:
        reference, result = references[name], results[0][name]
        assert result["attention_calls"] == 0, "transformer-engine's kernel and not ours"
        assert (result["scored"].logp_T - reference.logp_T).abs().mean() < 0.1
        assert result["grad_norm"] == pytest.approx(reference.grad_norm, rel=0.2)
