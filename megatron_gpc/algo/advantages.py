"""Group-relative advantages: how much better a sample is than its siblings."""

from __future__ import annotations

from typing import Literal

import torch

STD_EPSILON = 1e-6
"""Keeps the division finite; small beside the least nonzero std of 0/1 rewards, 1/sqrt(G)."""


def group_advantages(
    rewards_N: torch.Tensor, group_N: torch.Tensor, normalize: Literal["std", "mean"]
) -> torch.Tensor:
    """Reward minus the mean of the sample's group; with `std` divided by the group's deviation.

    `std` is GRPO (arXiv 2402.03300, section 4.1.2; the sample deviation, correction 1), `mean` is
    Dr. GRPO (arXiv 2503.20783), which drops the division because it favours easy and hard prompts.
    A group whose rewards are all equal teaches nothing: its advantages are exactly 0.

    Args:
        rewards_N: reward of each sample.
        group_N: which group a sample belongs to, 0 <= group < P, int64.
        normalize: `std` or `mean`.

    Returns:
        advantages_N, fp32.  Computed in float64, so that the order of the samples changes it by no
        more than the rounding of fp32.

    >>> group_advantages(torch.tensor([1., 0., 3., 3.]), torch.tensor([0, 0, 1, 1]), "mean")
    tensor([ 0.5000, -0.5000,  0.0000,  0.0000])
    """
    rewards_N = rewards_N.double()
    zeros_P = torch.zeros(int(group_N.max()) + 1, dtype=torch.float64)

    def over_group(values_N: torch.Tensor, how: Literal["sum", "amin", "amax"]) -> torch.Tensor:
        return zeros_P.scatter_reduce(0, group_N, values_N, how, include_self=False)[group_N]

    count_N = over_group(torch.ones_like(rewards_N), "sum")
    advantages_N = rewards_N - over_group(rewards_N, "sum") / count_N
    if normalize == "std":
        squares_N = over_group(advantages_N**2, "sum")
        advantages_N /= (squares_N / (count_N - 1).clamp(min=1)).sqrt() + STD_EPSILON
    # The mean of equal rewards can be off by an ulp; "nothing to learn" must be exact.
    equal_N = over_group(rewards_N, "amin") == over_group(rewards_N, "amax")
    return advantages_N.masked_fill(equal_N, 0.0).float()
