"""All experts in two products: the same numbers as one by one, also of those that get no token."""

from __future__ import annotations

import pytest
import torch
from layouts import CP2, DP2, EP2, PP2, SP, TP2, VPP2, Layout, hold_to, measure
from problems import Problem

GROUPED = "train.experts=grouped"
EVERYTHING = Layout(4, (TP2, PP2, VPP2, SP), ("moe",))


@pytest.mark.parametrize(
    "layout",
    [
        EVERYTHING,
        Layout(4, (PP2, DP2, EP2), ("moe",)),
        pytest.param(Layout(1, (), ("moe",)), marks=pytest.mark.slow),
        pytest.param(Layout(4, (TP2, SP, DP2, EP2), ("moe",)), marks=pytest.mark.slow),
        pytest.param(Layout(4, (CP2, DP2, "parallel.ep=4"), ("moe",)), marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_grouped_experts_give_the_numbers_of_float64(problems, references, pool, tmp_path, layout):
    results = measure(pool, layout, problems, tmp_path, GROUPED)
    reference = references["moe"]
    slots = range(len(reference.logp_T))
    hold_to(reference, [result["moe"] for result in results], slots, "moe")


def test_experts_and_ranks_without_a_token_do_too(problems, pool, tmp_path):
    problem: Problem = problems["moe"]
    layout, samples = Layout(4, (PP2, DP2, EP2), ("moe",)), [11]  # a token to learn, of seven
    results = measure(pool, layout, problems, tmp_path, GROUPED, samples=samples)
    reference = problem.reference(tmp_path, samples)
    hold_to(reference, [r["moe"] for r in results], problem.slots(samples), "moe")


@pytest.mark.parametrize("sizes", [(3, 0, 5, 2), (0, 0, 0, 7), (4, 4, 0, 0), (1, 1, 1, 1)])
def test_a_grouped_product_is_each_matrixs_own(pool, sizes):
    (got,) = pool(1).run(grouped_product, sizes)
    rows, weights, upstream = _example(sizes)
    rows, weights = rows.double().requires_grad_(), weights.double().requires_grad_()
    parts = zip(rows.split(sizes), weights, strict=True)
    want = torch.cat([part @ weight.t() for part, weight in parts])
    want.backward(upstream.double())
    for one, other in zip(got, (want, rows.grad, weights.grad), strict=True):
        torch.testing.assert_close(one.double(), other.detach(), atol=1e-5, rtol=0)


def _example(sizes: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(0)
    shapes = ((sum(sizes), 16), (len(sizes), 24, 16), (sum(sizes), 24))
    rows, weights, upstream = (torch.randn(shape, generator=draw) for shape in shapes)
    return rows, weights, upstream


def grouped_product(sizes: tuple[int, ...]) -> list[torch.Tensor]:
    """On a rank: the product and both gradients."""
    from megatron_gpc.mcore.experts import GroupedProduct

    rows, weights, upstream = _example(sizes)
    rows, apart = rows.requires_grad_(), [w.clone().requires_grad_() for w in weights]
    ends = torch.tensor(sizes).cumsum(0).to(torch.int32)
    made = GroupedProduct.apply(rows, ends, *apart)
    made.backward(upstream)
    return [made.detach(), rows.grad, torch.stack([w.grad for w in apart])]
