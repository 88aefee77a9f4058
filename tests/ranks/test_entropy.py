"""Entropy regions and the change of entropy at several layouts, against float64."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import ranks
import torch
import transformers
from layouts import CP2, DP2, EP2, PP2, REPLICATED, TP2, Layout, differences, measure
from problems import BOUNDS, Problem, Reference
from safetensors.torch import save_file
from tiny import run_config
from torch.func import functional_call


def expected_metrics(problem: Problem, reference: Reference) -> dict[str, float]:
    """The metrics of regions, written down token by token."""
    batch = problem.batch
    old_T = batch.rollout_logp_T.double()
    a_T = batch.advantages_N.double().repeat_interleave(batch.response_lengths_N)
    lnp_T, h_T = reference.logp_T, reference.entropy_T
    p_T, p2_T, p2_lnp_T = lnp_T.exp(), reference.sum_p2_T, reference.sum_p2_logp_T
    clipped_T = torch.tensor([low or high for low, high in reference.clip_decisions])
    weight_T = (lnp_T - old_T).exp() * a_T * ~clipped_T
    dh_T = -weight_T * (p_T * (lnp_T + h_T) - (p2_lnp_T + h_T * p2_T))
    mass_T = weight_T.abs() * ((1 - p_T) ** 2 + p2_T - p_T**2).sqrt()
    likely_T = -lnp_T < h_T
    found = {"dh_predicted": float(dh_T.mean())}
    for name, in_T in (
        ("e1", likely_T & (a_T > 0)),
        ("e2", ~likely_T & (a_T > 0)),
        ("e3", likely_T & (a_T < 0)),
        ("e4", ~likely_T & (a_T < 0)),
    ):
        found[f"clip_fraction_{name}"] = float(clipped_T[in_T].double().mean())
        found[f"gradient_share_{name}"] = float(mass_T[in_T].sum() / mass_T.sum())
        found[f"dh_predicted_{name}"] = float(dh_T[in_T].sum() / len(dh_T))
    return found


@pytest.mark.parametrize(
    "layout",
    [
        Layout(1, (), ("dense",)),
        Layout(4, (TP2, PP2), ("dense",)),
        Layout(4, (CP2, DP2), ("dense", "moe")),
    ],
    ids=str,
)
def test_what_each_region_does_is_the_same_at_every_layout(
    problems, references, pool, tmp_path, layout
):
    results = measure(pool, layout, problems, tmp_path)
    for name in layout.models:
        want = expected_metrics(problems[name], references[name])
        assert min(want[f"gradient_share_e{i}"] for i in (1, 2, 3, 4)) > 0
        for result in results:
            for metric, value in want.items():
                assert result[name][metric] == pytest.approx(value, rel=2e-5, abs=1e-8), metric


@pytest.mark.parametrize(
    ("layout", "kept", "numbers"),
    [
        (Layout(1, (), ("dense",)), "[e1]", "1"),
        (Layout(4, (TP2, PP2), ("tied",)), "[e2, e3]", "23"),
        (Layout(4, (CP2, DP2), ("dense",)), "e4", "4"),
    ],
    ids=str,
)
def test_only_tokens_of_kept_regions_give_gradient(problems, pool, tmp_path, layout, kept, numbers):
    results = measure(pool, layout, problems, tmp_path, f"clip.regions={kept}")
    for name in layout.models:
        of_ranks = [result[name] for result in results]
        reference = problems[name].reference(tmp_path, kept=numbers)
        found = differences(of_ranks, reference, range(len(reference.logp_T)))
        assert found.within_tolerance(), (name, found)
        for i in (1, 2, 3, 4):
            assert (of_ranks[0][f"gradient_share_e{i}"] > 0) == (str(i) in numbers)


def float64_model(problem: Problem, weights: dict[str, torch.Tensor], folder: Path) -> Any:
    """transformers' model with some weights; `folder` takes them as a checkpoint."""
    folder.mkdir()
    shutil.copy(problem.hf / "config.json", folder)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float64, attn_implementation="eager", experts_implementation="eager"
    )


def mean_entropy(problem: Problem, before: Any, after: Any, share: torch.Tensor) -> torch.Tensor:
    """Over the rollout's response tokens, a share of the way from one model to the other."""
    ends = dict(after.named_parameters())
    weights = {n: p.detach() + share * (ends[n] - p).detach() for n, p in before.named_parameters()}
    batch, found = problem.batch, []
    for n in range(batch.num_samples):
        start, prompt = int(batch.starts_N[n]), int(batch.prompt_lengths_N[n])
        tokens = batch.tokens[start : start + prompt + int(batch.response_lengths_N[n])]
        logits_SV = functional_call(before, weights, (tokens[None],)).logits[0, prompt - 1 : -1]
        logp_SV = logits_SV.log_softmax(-1)
        found.append(-(logp_SV.exp() * logp_SV).sum(-1))
    return torch.cat(found).mean()


@pytest.mark.parametrize(
    "layout",
    [
        Layout(1, (), ("tied",)),
        Layout(4, (TP2, PP2), ("tied",)),
        Layout(4, (CP2, DP2), ("dense",)),
        Layout(2, (DP2, REPLICATED), ("dense",)),
        Layout(2, (DP2, EP2), ("moe",)),
    ],
    ids=str,
)
def test_the_change_of_entropy_is_that_of_float64_and_of_finite_differences(
    problems, pool, tmp_path, layout
):
    (name,) = layout.models
    problem = problems[name]
    config = run_config(tmp_path, problem.hf, "optim.lr=1e-3", *layout.overrides)
    first, *others = pool(layout.world).run(
        ranks.entropy_change, config, problem.batch, BOUNDS, True
    )
    ends = [float64_model(problem, first[end], tmp_path / end) for end in ("before", "after")]

    def at(share: float) -> torch.Tensor:
        return mean_entropy(problem, *ends, torch.tensor(share, dtype=torch.float64))

    share = torch.zeros((), dtype=torch.float64, requires_grad=True)
    (directional,) = torch.autograd.grad(mean_entropy(problem, *ends, share), share)
    end = torch.ones((), dtype=torch.float64, requires_grad=True)
    (at_end,) = torch.autograd.grad(mean_entropy(problem, *ends, end), end)
    assert abs(directional) > 1e-3
    with torch.no_grad():
        assert first["metrics"]["dh_measured"] == pytest.approx(float(at(1) - at(0)), abs=1e-6)
        if name != "moe":  # whose choice of experts jumps
            difference = float(at(1e-3) - at(-1e-3)) / 2e-3
            assert first["metrics"]["dh_directional"] == pytest.approx(difference, rel=1e-3)
    found = [first["metrics"][f"dh_{name}"] for name in ("directional", "second_order")]
    want = [float(directional), float(directional + at_end) / 2]
    assert found == pytest.approx(want, rel=1e-4)
    assert all(other["metrics"] == first["metrics"] for other in others)


def test_measuring_signal_and_entropy_changes_no_bit_of_training(problems, pool, tmp_path):
    problem = problems["dense"]
    config = run_config(tmp_path, problem.hf, DP2)
    with_it, without = (
        pool(2).run(ranks.entropy_change, config, problem.batch, BOUNDS, measured)[0]
        for measured in (True, False)
    )
    for name, tensor in without["after"].items():
        assert torch.equal(with_it["after"][name], tensor), name
