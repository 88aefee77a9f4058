"""The four regions, and the inner product they come from, against autograd."""

from __future__ import annotations

import math

import pytest
import torch

from megatron_gpc.algo.regions import (
    entropy_inner_product,
    gradient_norm,
    keep_regions,
    region_masks,
    region_sums,
)
from megatron_gpc.kernels.vocab_parallel import token_stats
from megatron_gpc.types import TokenStats


def random_tokens(count: int = 200, vocab: int = 12):
    draw = torch.Generator().manual_seed(0)
    logits_TV = 2 * torch.randn(count, vocab, generator=draw)
    targets_T = torch.multinomial(logits_TV.softmax(-1), 1, generator=draw)[:, 0]
    return logits_TV, targets_T, torch.randn(count, generator=draw)


def test_regions_are_disjoint_and_cover_every_token_with_an_advantage():
    logits_TV, targets_T, adv_T = random_tokens()
    adv_T[:10] = 0
    stats = token_stats(logits_TV, targets_T, vocab_size=12)
    masks = torch.stack(region_masks(stats.logp_T, stats.entropy_T, adv_T))
    assert masks.sum(0).tolist() == [0] * 10 + [1] * 190
    assert masks.any(1).all(), "each region occurs"


def test_inner_product_equals_autograd_of_surrogate_and_entropy():
    logits_TV, targets_T, adv_T = random_tokens()
    stats = token_stats(logits_TV, targets_T, vocab_size=12)
    x = logits_TV.double().requires_grad_()
    logp_TV = x.log_softmax(-1)
    entropy = -(logp_TV.exp() * logp_TV).sum()
    surrogate = (logp_TV.gather(1, targets_T[:, None])[:, 0] * adv_T).sum()
    (grad_h,) = torch.autograd.grad(entropy, x, retain_graph=True)
    (grad_l,) = torch.autograd.grad(surrogate, x)
    expected_T = (grad_h * grad_l).sum(-1).float()
    torch.testing.assert_close(
        entropy_inner_product(stats, adv_T), expected_T, rtol=1e-4, atol=1e-6
    )
    torch.testing.assert_close(
        gradient_norm(stats, adv_T), grad_l.norm(dim=-1).float(), rtol=1e-3, atol=1e-5
    )


def test_a_token_that_is_certain_has_no_gradient_and_no_nan():
    logits_TV = torch.tensor([[200.0, 0.0, 0.0]])
    stats = token_stats(logits_TV, torch.tensor([0]), vocab_size=3)
    assert gradient_norm(stats, torch.ones(1)).tolist() == [0.0]
    assert entropy_inner_product(stats, torch.ones(1)).tolist() == [0.0]


def test_a_token_of_probability_0_has_only_its_baseline_term_and_no_nan():
    """p = (1/2, 1/2, 0): <dJ/dx, dH/dx> = sum p^2 (ln p + H) = 0."""
    half, ln2 = torch.tensor([0.5]), torch.tensor([math.log(2)])
    for logp in (-1e30, -math.inf):
        stats = TokenStats(torch.tensor([logp]), ln2, half, -ln2 / 2)
        assert gradient_norm(stats, torch.ones(1)).item() == pytest.approx(1.5**0.5)
        assert entropy_inner_product(stats, torch.ones(1)).item() == 0.0


def test_dropped_regions_have_no_advantage_and_all_four_change_nothing():
    logits_TV, targets_T, adv_T = random_tokens()
    stats = token_stats(logits_TV, targets_T, vocab_size=12)
    masks = region_masks(stats.logp_T, stats.entropy_T, adv_T)
    assert keep_regions(adv_T, masks, ("e4", "e3", "e2", "e1")) is adv_T
    kept_T = keep_regions(adv_T, masks, ("e2", "e4"))
    assert torch.equal(kept_T != 0, masks[1] | masks[3])
    assert torch.equal(kept_T[kept_T != 0], adv_T[masks[1] | masks[3]])


def test_sums_of_regions_add_up_to_those_of_all_tokens():
    logits_TV, targets_T, adv_T = random_tokens()
    stats = token_stats(logits_TV, targets_T, vocab_size=12)
    masks = region_masks(stats.logp_T, stats.entropy_T, adv_T)
    clipped_T = torch.arange(200) % 5 == 0
    sums = region_sums(stats, masks, adv_T.where(~clipped_T, 0.0), clipped_T)
    assert sums.tokens.tolist() == [float(mask.sum()) for mask in masks]
    assert sums.clipped.tolist() == [float((mask & clipped_T).sum()) for mask in masks]
    torch.testing.assert_close(sums.mass.sum(), sums.all_mass)
    torch.testing.assert_close(sums.dh.sum(), sums.all_dh)


def test_sign_of_the_token_term_is_the_region():
    logits_TV, targets_T, adv_T = random_tokens()
    stats = token_stats(logits_TV, targets_T, vocab_size=12)
    e1, e2, e3, e4 = region_masks(stats.logp_T, stats.entropy_T, adv_T)
    token_term_T = -adv_T * stats.logp_T.exp() * (stats.logp_T + stats.entropy_T)
    assert (token_term_T[e1 | e4] < 0).all() and (token_term_T[e2 | e3] > 0).all()
