"""Evaluation on held-out prompts: how it samples, and what is said of the samples."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from megatron_gpc.config import Config, EvalConfig
from megatron_gpc.metrics.pass_at_k import pass_at_k, pass_ks
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


def groups_of(samples: Sequence[Sample], group_size: int) -> list[Sequence[Sample]]:
    """The samples of each prompt."""
    return [samples[i : i + group_size] for i in range(0, len(samples), group_size)]


def right_P(samples: Sequence[Sample], group_size: int) -> list[int]:
    """How many samples of each prompt are right."""
    return [sum(s.right for s in group) for group in groups_of(samples, group_size)]


def distinct_right(samples: Sequence[Sample], group_size: int) -> float:
    """Mean over prompts of how many different right answers their samples gave."""
    groups = groups_of(samples, group_size)
    return sum(len({s.text for s in group if s.right}) for group in groups) / len(groups)


def score_means(samples: Sequence[Sample], prefix: str) -> dict[str, float]:
    """Mean of each further number of the verifier, over the samples that have it."""
    names = dict.fromkeys(name for sample in samples for name in sample.scores)
    values = {name: [s.scores[name] for s in samples if name in s.scores] for name in names}
    return {f"{prefix}{name}": sum(having) / len(having) for name, having in values.items()}


def evaluation_metrics(samples: Sequence[Sample], config: EvalConfig) -> dict[str, float]:
    """What a run reports of an evaluation; `samples` are config.samples of each prompt."""
    right = right_P(samples, config.samples)
    return {
        "eval_reward": sum(s.reward for s in samples) / len(samples),
        "eval_distinct_right": distinct_right(samples, config.samples),
        "eval_solved": sum(2 * count >= config.samples for count in right) / len(right),
        **score_means(samples, "eval_reward_"),
        **{f"eval_pass_at_{k}": pass_at_k(right, config.samples, k) for k in pass_ks(config)},
    }
