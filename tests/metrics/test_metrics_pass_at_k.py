from __future__ import annotations

from itertools import combinations

import pytest

from megatron_gpc.metrics.pass_at_k import pass_at_k, powers_of_two


@pytest.mark.parametrize("right", range(6))
@pytest.mark.parametrize("k", range(1, 6))
def test_it_is_the_share_of_subsets_that_hold_a_right_sample(right, k):
    subsets = list(combinations(range(5), k))
    holding = sum(any(i < right for i in subset) for subset in subsets)
    assert pass_at_k([right], 5, k) == pytest.approx(holding / len(subsets))


def test_prompts_count_alike_and_k_goes_up_to_the_number_of_samples():
    assert pass_at_k([0, 64], 64, 64) == 0.5
    assert powers_of_two(64) == [1, 2, 4, 8, 16, 32, 64] and powers_of_two(1) == [1]
