"""Group-relative advantages."""

from __future__ import annotations

import torch

from megatron_gpc.algo.advantages import group_advantages


def test_std_equals_a_naive_reference_group_by_group():
    rewards_N = torch.rand(24, generator=torch.Generator().manual_seed(0))
    group_N = torch.arange(24) // 8
    expected = []
    for group in rewards_N.double().view(3, 8):
        expected.append((group - group.mean()) / (group.std() + 1e-6))
    torch.testing.assert_close(
        group_advantages(rewards_N, group_N, "std"), torch.cat(expected).float()
    )


def test_mean_only_centres_and_does_not_scale():
    rewards_N = torch.tensor([1.0, 0.0, 0.0, 0.0])
    adv_N = group_advantages(rewards_N, torch.zeros(4, dtype=torch.int64), "mean")
    assert adv_N.tolist() == [0.75, -0.25, -0.25, -0.25]


def test_a_group_of_equal_rewards_has_exactly_zero_advantage():
    rewards_N = torch.tensor([0.1] * 7 + [1.0, 0.0])
    group_N = torch.tensor([0] * 7 + [1, 1])
    for normalize in ("std", "mean"):
        adv_N = group_advantages(rewards_N, group_N, normalize)
        assert (adv_N[:7] == 0).all() and (adv_N[7:] != 0).all()


def test_groups_may_be_interleaved():
    rewards_N = torch.tensor([1.0, 5.0, 0.0, 3.0])
    adv_N = group_advantages(rewards_N, torch.tensor([0, 1, 0, 1]), "mean")
    assert adv_N.tolist() == [0.5, 1.0, -0.5, -1.0]
