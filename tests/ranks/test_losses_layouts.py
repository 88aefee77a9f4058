"""Each loss, and the KL term, give the numbers of one float64 process at every layout."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers
from layouts import (
    CP2,
    DP2,
    EP2,
    LAYOUTS,
    PP2,
    SP,
    TP2,
    VPP2,
    Layout,
    clip_decisions,
    differences,
    measure,
)
from objectives import Objective, cispo, clip, clip_cov, gspo
from problems import Problem, Reference

KL = 0.3
LOSSES: dict[str, tuple[str, Objective]] = {
    "gspo": ("{}", gspo(3e-4, 4e-4)),
    "cispo": ("{eps_low: 0.3, eps_high: 0.2}", cispo(0.3, 0.2)),
    "clip-cov": ("{share: 0.1, low: 0.3, high: 2}", clip_cov(0.1, 0.3, 2.0)),
    "clip": ("{}", clip),
}
"""Arguments and what they come to; `clip` stands for itself with the KL term."""


@pytest.fixture(scope="module")
def other_weights(problems: dict[str, Problem], tmp_path_factory) -> dict[str, Path]:
    """Reference models: the policies with a little noise on every weight."""
    made = {}
    for name, problem in problems.items():
        torch.manual_seed(1)
        model = transformers.AutoModelForCausalLM.from_pretrained(problem.hf)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 0.1 * parameter.std() * torch.randn_like(parameter)
        made[name] = tmp_path_factory.mktemp(f"reference-{name}")
        model.save_pretrained(made[name])
    return made


@pytest.fixture(scope="module")
def references_of_losses(problems, other_weights, tmp_path_factory):
    """(loss, model) -> the reference, made when it is first asked for."""
    made: dict[tuple[str, str], Reference] = {}

    def reference(loss: str, name: str) -> Reference:
        if (loss, name) not in made:
            made[loss, name] = problems[name].reference(
                tmp_path_factory.mktemp("gradient"),
                objective=LOSSES[loss][1],
                kl=(KL, other_weights[name]) if loss == "clip" else None,
            )
        return made[loss, name]

    return reference


def hold_all(loss, layout, problems, references, other_weights, pool, folder) -> None:
    """Hold every model of the layout to its reference."""
    arguments, _ = LOSSES[loss]
    for name in layout.models:
        more = [f"train.loss={loss}", f"train.loss_arguments={arguments}"]
        if loss == "clip":
            more += [f"kl.coef={KL}", f"kl.reference={other_weights[name]}"]
        given = {name: problems[name]}
        results = [result[name] for result in measure(pool, layout, given, folder, *more)]
        reference = references(loss, name)
        slots = range(len(reference.logp_T))
        found = differences(results, reference, slots)
        # terms of both signs and of size 1 may add up to little
        found = replace(found, loss=found.loss * abs(reference.loss))
        assert found.within_tolerance(), (name, found)
        assert clip_decisions(results, slots) == reference.clip_decisions, name
        if loss == "clip":
            assert results[0]["kl"] == pytest.approx(reference.kl, rel=1e-5)


@pytest.mark.parametrize(
    ("loss", "layout"),
    [
        ("gspo", Layout(1, ("train.micro_batch_size=5", "train.micro_batch_tokens=60"), ("tied",))),
        ("gspo", Layout(4, (CP2, DP2), ("dense",))),
        ("gspo", Layout(4, (TP2, PP2, VPP2, SP), ("tied",))),
        ("gspo", Layout(4, ("parallel.cp=4",), ("moe",))),
        ("cispo", Layout(4, (CP2, PP2), ("tied",))),
        ("cispo", Layout(2, (DP2,), ("moe",))),
        ("clip-cov", Layout(4, (TP2, PP2), ("dense",))),
        ("clip-cov", Layout(4, (CP2, DP2, "parallel.ep=4"), ("moe",))),
        ("clip", Layout(4, (TP2, PP2, VPP2, SP), ("tied",))),
        ("clip", Layout(4, (TP2, SP, DP2, EP2), ("moe",))),
    ],
    ids=str,
)
def test_losses_at_some_layouts(
    problems, references_of_losses, other_weights, pool, tmp_path, loss, layout
):
    hold_all(loss, layout, problems, references_of_losses, other_weights, pool, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("loss", LOSSES)
def test_losses_at_every_layout(
    problems, references_of_losses, other_weights, pool, tmp_path, loss, layout
):
    hold_all(loss, layout, problems, references_of_losses, other_weights, pool, tmp_path)


def test_the_losses_bounds_act_and_nothing_is_so_near_one_that_fp32_could_decide(
    references_of_losses,
):
    for loss in LOSSES:
        for name in ("tied", "moe"):
            reference = references_of_losses(loss, name)
            low, high = (sum(side) for side in zip(*reference.clip_decisions, strict=True))
            assert low > 5 and high > 10 and reference.margin > 1e-5, (loss, name)
            assert loss != "clip" or reference.kl > 0.01


def test_gspo_waits_for_no_rank_that_holds_no_token_of_a_micro_batch(problems, pool, tmp_path):
    """One response of one token: it is on one of four context-parallel ranks."""
    layout = Layout(4, ("parallel.cp=4",), ("dense",))
    more = ("train.loss=gspo", "train.loss_arguments={eps_low: 0.9, eps_high: 9}")
    problem = problems["dense"]
    results = measure(pool, layout, problems, tmp_path, *more, samples=[4])
    reference = problem.reference(tmp_path, [4], objective=gspo(0.9, 9))
    found = differences([r["dense"] for r in results], reference, problem.slots([4]))
    assert found.within_tolerance(), found
