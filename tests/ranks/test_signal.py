"""signal_share: which halves, and their gradients' cosine at every layout, against float64."""

from __future__ import annotations

import math

import pytest
import ranks
import torch
from layouts import CP2, DP2, EP2, PP2, REPLICATED, SP, TP2, VPP2, Layout, measure
from problems import BOUNDS
from tiny import random_batch, run_config

from megatron_gpc.batching import pack
from megatron_gpc.mcore.signal_share import halves

HALVES = ([0, 1, 2, 3, 8, 9, 10, 11], [4, 5, 6, 7])
"""Of the problems' three prompts with four samples each."""


def test_the_samples_of_a_prompt_stay_together_and_prompts_that_teach_are_dealt_out_first(problems):
    assert halves(problems["dense"].batch) == HALVES
    batch = random_batch(prompts=6, group=2)
    batch.advantages_N[:] = torch.tensor([0.0, 0, 1, -1, 0, 0, 1, -1, 1, -1, 1, -1])
    assert halves(batch) == ([0, 1, 2, 3, 8, 9], [4, 5, 6, 7, 10, 11])
    assert halves(pack([], torch.zeros(0))) == ([], [])


@pytest.mark.parametrize(
    "layout",
    [
        Layout(1, (), ("dense", "tied", "moe")),
        Layout(2, (TP2, SP), ("tied",)),
        Layout(4, (TP2, PP2), ("dense", "tied")),
        Layout(2, (PP2, VPP2), ("dense",)),
        Layout(4, (CP2, DP2), ("dense", "moe")),
        Layout(2, (DP2, REPLICATED), ("dense",)),
        Layout(2, (DP2, EP2), ("moe",)),
    ],
    ids=str,
)
def test_the_halves_cosine_is_that_of_float64_gradients(problems, pool, tmp_path, layout):
    first, *others = measure(pool, layout, problems, tmp_path, run=ranks.signal)
    for name in layout.models:
        one, other = (
            torch.cat([g.double().flatten() for _, g in sorted(found.gradient.items())])
            for found in (problems[name].reference(tmp_path / name, half) for half in HALVES)
        )
        cosine = torch.nn.functional.cosine_similarity(one, other, dim=0)
        assert 1e-3 < abs(cosine) < 0.99
        assert first[name] == pytest.approx(float(cosine), rel=1e-4, abs=1e-6)
    assert all(one == first for one in others)


def test_without_two_prompts_or_without_advantages_there_is_no_cosine(problems, pool, tmp_path):
    batches = [random_batch(prompts=1), random_batch(prompts=2), pack([], torch.zeros(0))]
    batches[1].advantages_N[:] = 0.0
    given = {str(i): (problems["dense"].hf, batch) for i, batch in enumerate(batches)}
    config = run_config(tmp_path, tmp_path, DP2)
    for found in pool(2).run(ranks.signal, config, given, BOUNDS, None):
        assert all(map(math.isnan, found.values())) and len(found) == 3
