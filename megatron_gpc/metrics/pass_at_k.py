"""pass@k: how likely one of k samples of a prompt is right."""

from __future__ import annotations

import math
from collections.abc import Sequence

from megatron_gpc.config import EvalConfig
from megatron_gpc.errors import UserError


def powers_of_two(samples: int) -> list[int]:
    """The k that are reported for so many samples a prompt: 1, 2, 4, ... up to their number."""
    return [2**i for i in range(samples.bit_length())]


def pass_ks(config: EvalConfig) -> list[int]:
    """The k that are configured, ascending; or powers of two.

    Raises:
        UserError: one is larger than the number of samples a prompt.
    """
    if not config.pass_k:
        return powers_of_two(config.samples)
    if max(config.pass_k) > config.samples:
        raise UserError(
            f"eval.pass_k: pass@{max(config.pass_k)} needs as many samples a prompt; "
            f"eval.samples={config.samples}"
        )
    return sorted(set(config.pass_k))


def pass_at_k(right_P: Sequence[int], samples: int, k: int) -> float:
    """Mean over prompts of the unbiased estimate 1 - C(n - c, k) / C(n, k) (Chen et al., arXiv
    2107.03374, equation 1).

    Args:
        right_P: c, how many of a prompt's samples were right.
        samples: n, samples of every prompt.
        k: at most n.

    >>> pass_at_k([1, 0], samples=4, k=2)
    0.25
    """
    all_k = math.comb(samples, k)
    return sum(1 - math.comb(samples - right, k) / all_k for right in right_P) / len(right_P)
