"""Every layout gives the numbers of one float64 process that takes one sequence at a time."""

from __future__ import annotations

import pytest
import ranks
from layouts import (
    CP2,
    DP2,
    LAYOUTS,
    PP2,
    SP,
    TP2,
    VPP2,
    Layout,
    differences,
    hold_to,
    measure,
    two_models_each,
)
from problems import BOUNDS
from tiny import run_config


@pytest.mark.parametrize("layout", two_models_each(LAYOUTS), ids=str)
def test_every_layout_gives_the_numbers_of_float64(problems, references, pool, tmp_path, layout):
    _hold_to_float64(problems, references, pool, tmp_path, layout, "auto")


@pytest.mark.parametrize("head", ["fused", "logits"])
@pytest.mark.parametrize(
    "layout",
    [
        Layout(1, (), ("tied",)),
        Layout(2, (TP2, SP), ("dense",)),
        Layout(4, (TP2, PP2, VPP2, SP), ("tied",)),
        Layout(4, (CP2, DP2), ("moe",)),
    ],
    ids=str,
)
def test_every_way_from_hidden_states_to_log_probs_gives_them_too(
    problems, references, pool, tmp_path, layout, head
):
    _hold_to_float64(problems, references, pool, tmp_path, layout, head)


@pytest.mark.slow
@pytest.mark.parametrize("head", ["auto", "fused"])
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_every_layout_gives_every_model_the_numbers_of_float64(
    problems, references, pool, tmp_path, layout, head
):
    _hold_to_float64(problems, references, pool, tmp_path, layout, head)


def _hold_to_float64(problems, references, pool, tmp_path, layout, head):
    results = measure(pool, layout, problems, tmp_path, f"train.head={head}")
    for name in layout.models:
        of_ranks, reference = [result[name] for result in results], references[name]
        slots = range(len(reference.logp_T))
        hold_to(reference, of_ranks, slots, name)
        for one in of_ranks:
            for metric, side in (("clip_fraction_low", 0), ("clip_fraction_high", 1)):
                clipped = [flags[side] for flags in reference.clip_decisions]
                assert one[metric] == sum(clipped) / len(clipped)


def test_clipping_acts_and_no_ratio_is_so_near_a_bound_that_fp32_could_decide(references):
    for reference in references.values():
        low, high = (sum(side) for side in zip(*reference.clip_decisions, strict=True))
        assert low > 10 and high > 10 and low + high < len(reference.logp_T) / 2
        assert reference.margin > 1e-4


FEW = [
    (Layout(1), [11]),
    # ranks without a token, before and after a response of 100
    (Layout(4, ("parallel.dp=4",)), [1, 0, 4]),
    # four micro-batches for three sequences
    (Layout(4, (PP2, VPP2, DP2)), [4, 1, 0]),
    # one token in all: it has its row on one context-parallel rank of one replica
    (Layout(4, (CP2, DP2)), [4]),
    (Layout(4, (CP2, TP2, SP)), [2]),
    (Layout(4, (PP2, DP2, "parallel.ep=2"), ("moe",)), [11]),
    (Layout(4, ("parallel.dp=4", "parallel.ep=4"), ("moe",)), [11, 3]),
]
"""Layouts with the samples of mini-batches so small that some ranks have no response token."""


@pytest.mark.parametrize(
    ("layout", "samples"),
    [
        *zip(two_models_each([layout for layout, _ in FEW]), (few for _, few in FEW), strict=True),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in FEW),
    ],
    ids=str,
)
def test_ranks_and_micro_batches_without_a_response_token_add_nothing(
    problems, pool, tmp_path, layout, samples
):
    results = measure(pool, layout, problems, tmp_path, samples=samples)
    for name in layout.models:
        problem, of_ranks = problems[name], [result[name] for result in results]
        reference, slots = problem.reference(tmp_path, samples), problem.slots(samples)
        hold_to(reference, of_ranks, slots, name)


@pytest.mark.parametrize(
    "layout",
    [
        Layout(2, (TP2, "train.head=fused"), ("tied",)),
        Layout(4, (CP2, PP2), ("qk-norm", "moe")),
        pytest.param(Layout(4, (CP2, PP2)), marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_the_entropy_bonus_has_the_same_gradient_too(problems, pool, tmp_path, layout):
    results = measure(pool, layout, problems, tmp_path, "train.entropy_coef=0.1")
    for name in layout.models:
        reference = problems[name].reference(tmp_path, entropy_coef=0.1)
        slots = range(len(reference.logp_T))
        found = differences([result[name] for result in results], reference, slots)
        assert found.within_tolerance(), (name, found)


def test_groups_of_one_rank_exchange_nothing(problems, pool, tmp_path):
    problem = problems["dense"]
    given = (problem.hf, problem.batch, BOUNDS)
    config = run_config(tmp_path, tmp_path)
    assert pool(1).run(ranks.collectives_of_update, config, *given) == [set()]
    for found in pool(2).run(
        ranks.collectives_of_update, run_config(tmp_path, tmp_path, TP2), *given
    ):
        assert "c10d::allreduce_" in found
        assert not any("coalesced" in name for name in found), "there is one data-parallel rank"
