"""Evaluation on held-out prompts: how it samples, and what is said of the samples."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

from megatron_gpc.config import Config
from megatron_gpc.errors import UserError
from megatron_gpc.types import Sample


def as_evaluated(config: Config) -> Config:
    """The run's configuration with evaluation's sampling in place of training's.

    The verifier's word stands as it is: no penalty for length.
    """
    rollout, held_out = config.rollout, config.eval
    return dataclasses.replace(
        config,
        rollout=dataclasses.replace(
            rollout,
            temperature=held_out.temperature or rollout.temperature,
            max_response_tokens=held_out.max_response_tokens or rollout.max_response_tokens,
            overlong="keep",
            oversample=1.0,
        ),
    )


def nucleus(config: Config) -> dict[str, Any]:
    """The sampling parameters that evaluation has and training has not, in SGLang's names."""
    return {"top_p": config.eval.top_p, "top_k": config.eval.top_k}


def pass_ks(config: Config) -> tuple[int, ...]:
    """The k of pass@k, ascending.

    Raises:
        UserError: one is larger than the number of samples a prompt.
    """
    samples, ks = config.eval.samples, config.eval.pass_k
    if not ks:
        return tuple(2**power for power in range(samples.bit_length()))
    if max(ks) > samples:
        raise UserError(
            f"eval.pass_k: pass@{max(ks)} needs as many samples a prompt; eval.samples={samples}"
        )
    return tuple(sorted(set(ks)))


def pass_at_k(right: int, samples: int, k: int) -> float:
    """Chance that k of the samples, drawn without replacement, hold a right one.

    The unbiased estimator 1 - C(n - c, k) / C(n, k) of arXiv 2107.03374.

    >>> pass_at_k(right=1, samples=4, k=2)
    0.5
    """
    return 1.0 - math.comb(samples - right, k) / math.comb(samples, k)


def groups_of(samples: Sequence[Sample], group_size: int) -> list[Sequence[Sample]]:
    """The samples of each prompt."""
    return [samples[i : i + group_size] for i in range(0, len(samples), group_size)]


def distinct_right(samples: Sequence[Sample], group_size: int) -> float:
    """Mean over prompts of how many different right answers their samples gave."""
    groups = groups_of(samples, group_size)
    return sum(len({s.text for s in group if s.reward > 0}) for group in groups) / len(groups)
