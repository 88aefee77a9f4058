"""Routing replay: tokens go where the rollout sent them, at every layout, recomputed or not."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from layouts import CP2, DP2, EP2, ONE, PP2, SP, TP2, VPP2, Layout, hold_to, measure
from problems import BOUNDS, make_problem, own_routes
from tiny import plain_streams

from megatron_gpc.mcore import cpu

EVERYTHING = Layout(4, (TP2, PP2, VPP2, SP))
REPLAY = "train.routing_replay=true"
RECOMPUTED = {
    "full": ("full", "recompute_method=uniform", "recompute_num_layers=1"),
    "experts": ("selective", "recompute_modules=[moe]"),
}


@pytest.fixture(scope="module")
def routed(tmp_path_factory):
    """A model whose second layer has no experts, and a rollout with routes of its own; the
    reference."""
    folder = tmp_path_factory.mktemp("routed")
    problem = make_problem("moe", folder, routes=True, mlp_only_layers=[1])
    return problem, problem.reference(folder)


def _hold_to_routes(routed, pool, tmp_path, layout, *more):
    problem, reference = routed
    results = measure(pool, layout, {"moe": problem}, tmp_path, REPLAY, *more)
    of_ranks = [result["moe"] for result in results]
    hold_to(reference, of_ranks, range(len(reference.logp_T)), "moe")
    # of two experts among four, drawn at random, one is another than the router's own, on average
    assert all(0.4 < one["routing_changed"] < 0.6 for one in of_ranks)
    return of_ranks


@pytest.mark.parametrize(
    "layout",
    [
        EVERYTHING,
        Layout(4, (CP2, DP2, "parallel.ep=4")),
        pytest.param(ONE, marks=pytest.mark.slow),
        pytest.param(Layout(2, (TP2, SP)), marks=pytest.mark.slow),
        pytest.param(Layout(4, (CP2, TP2, SP)), marks=pytest.mark.slow),
        pytest.param(Layout(4, (PP2, DP2, EP2)), marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_every_layout_follows_the_routes_to_the_numbers_of_float64(routed, pool, tmp_path, layout):
    _hold_to_routes(routed, pool, tmp_path, layout)


@pytest.mark.parametrize("recomputed", RECOMPUTED)
@pytest.mark.parametrize(
    "layout", [EVERYTHING, pytest.param(Layout(1), marks=pytest.mark.slow)], ids=str
)
def test_what_is_recomputed_follows_the_routes_of_its_micro_batch(
    routed, pool, tmp_path, layout, recomputed
):
    granularity, *rest = RECOMPUTED[recomputed]
    overrides = (f"recompute_granularity={granularity}", *rest)
    more = [f"megatron.transformer.{override}" for override in overrides]
    _hold_to_routes(routed, pool, tmp_path, layout, "train.micro_batch_size=2", *more)


def test_routes_are_left_alone_unless_they_are_asked_for(problems, references, pool, tmp_path):
    problem, reference = problems["moe"], references["moe"]
    columns = 4 * 2  # layers times experts a token
    routes = torch.zeros(len(problem.batch.tokens), columns, dtype=torch.int16)
    batch = dataclasses.replace(problem.batch, routes=routes)
    routed = dataclasses.replace(problem, batch=batch)
    (result,) = measure(pool, ONE, {"moe": routed}, tmp_path)
    hold_to(reference, [result["moe"]], range(len(reference.logp_T)), "moe")
    assert "routing_changed" not in result["moe"]


def test_the_routers_own_routes_change_nothing_and_others_are_not_followed_where_unknown(
    problems, pool, tmp_path
):
    problem = problems["moe"]
    unknown = torch.full((len(problem.batch.tokens), 8), -1, dtype=torch.int16)
    batch = dataclasses.replace(problem.batch, routes=unknown)
    routed = dataclasses.replace(problem, batch=batch)
    (free,) = measure(pool, ONE, {"moe": problem}, tmp_path)
    (got,) = measure(pool, ONE, {"moe": routed}, tmp_path, REPLAY)
    for name, want in free["moe"]["after"].items():
        assert torch.equal(got["moe"]["after"][name], want), name
    assert torch.equal(got["moe"]["scored"].logp_T, free["moe"]["scored"].logp_T)


def test_with_the_rollouts_routes_a_coarser_trainer_is_nearer_to_it(
    problems, references, pool, tmp_path
):
    problem, reference = problems["moe"], references["moe"]
    batch = dataclasses.replace(problem.batch, routes=own_routes(problem))
    routed = dataclasses.replace(problem, batch=batch)

    def gap(*more: str) -> tuple[float, float]:
        (found,) = measure(pool, ONE, {"moe": routed}, tmp_path, *more)
        far_T = (found["moe"]["scored"].logp_T - reference.logp_T).abs()
        return float(far_T.mean()), found["moe"].get("routing_changed", 0.0)

    same, changed = gap(REPLAY)
    assert same < 1e-5 and changed == 0, "fp32 chooses as float64 does"
    free, _ = gap("model.dtype=bfloat16")
    followed, changed = gap("model.dtype=bfloat16", REPLAY)
    assert 0 < changed < 0.1 and followed < 0.8 * free, (changed, followed, free)


def test_a_mini_batch_that_is_kept_has_its_routes(routed, tmp_path):
    cpu.install()
    from megatron_gpc.mcore.updates import save_mini_batch

    batch = routed[0].batch
    save_mini_batch(tmp_path / "kept.pt", batch, [3, 0], plain_streams(batch), BOUNDS)
    kept = torch.load(tmp_path / "kept.pt", weights_only=True)
    for tokens, routes, n in zip(kept["tokens"], kept["routes"], [3, 0], strict=True):
        begin = int(batch.starts_N[n])
        assert torch.equal(routes, batch.routes[begin : begin + len(tokens)])


def test_the_reference_model_routes_by_itself(routed, pool, tmp_path):
    more = (REPLAY, "kl.coef=0.1")
    (result,) = measure(pool, ONE, {"moe": routed[0]}, tmp_path, *more)
    assert result["moe"]["kl"] > 0.01, "its weights are the policy's: only routes differ"
