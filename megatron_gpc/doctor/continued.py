"""What a changed configuration does to a run that it continues, where that is not plain to see."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from pydantic import TypeAdapter, ValidationError

from megatron_gpc.config import ClipConfig, Config
from megatron_gpc.config.file import flatten, plain

CONSEQUENCES = {
    "seed": "the rest of this epoch comes in another order, so that some prompts come twice in it "
    "and others not at all",
    "data.prompts": "the run goes on at its position, and only if the prompts are the same or "
    "data.changed=accept",
    "data.changed": "other prompts go on at the same position: in this epoch some may come twice "
    "and others not at all",
    "data.verifier": "rewards before and after are of different judges",
    "data.verifier_arguments": "rewards before and after are of different judges",
    "data.right_at": "right answers before and after are other ones",
    "model.hf": "only configuration and tokenizer are read from it; the weights are the "
    "checkpoint's",
    "rollout.temperature": "log-probs, ratios and entropies are of another distribution from here "
    "on, also where clip.schedule=od or target holds them against its first",
    "rollout.group_size": "advantages have another baseline; samples begun or made ahead are made "
    "anew",
    "rollout.prompts_per_step": "an epoch takes another number of steps; samples made ahead are "
    "made anew",
    "rollout.max_response_tokens": "samples begun or made ahead are made anew",
    "rollout.replay": "what is sampled instead begins at the first prompt where the checkpoint is "
    "of a replayed run",
    **dict.fromkeys(
        ("eval.prompts", "eval.samples", "eval.temperature", "eval.top_p", "eval.top_k",
         "eval.max_response_tokens"),
        "evaluations before and after cannot be compared",
    ),
}  # fmt: skip
"""Key -> what its change means in mid-run."""
_MOVES_THRESHOLDS = re.compile(r"clip\.(?!regions$)|train\.steps$")
_MOVES_RATE = (
    *("optim.lr", "optim.min_lr", "optim.warmup_updates", "optim.decay"),
    *("train.steps", "train.mini_batches", "train.epochs"),
)
"""Keys that decide a step's thresholds, and its learning rate; they jump only at some steps."""


def consequences(old: Mapping[str, Any], config: Config, step: int) -> list[str]:
    """A sentence for each consequence of going on under another configuration.

    Args:
        old: the run's configuration so far, as its config.yaml has it.
        config: the one that it goes on with.
        step: finished training steps.
    """
    changed = _changed(old, plain(config))
    found = [f"{key}: {CONSEQUENCES[key]}" for key in changed if key in CONSEQUENCES]
    try:
        was = TypeAdapter(Config).validate_python(old)
    except ValidationError:  # another version's: no more can be said
        return found
    if step >= config.train.steps:
        return [f"train.steps: {step} steps are done, so there is nothing left to do", *found]
    changed = _changed(plain(was), plain(config))
    thresholds = [key for key in changed if _MOVES_THRESHOLDS.match(key)]
    rate = [key for key in changed if key in _MOVES_RATE]
    return [
        *_thresholds(", ".join(thresholds), was, config, step),
        *_learning_rate(", ".join(rate), was, config, step),
        *found,
    ]


def _changed(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    before, after = flatten(old), flatten(new)
    return [key for key in {**after, **before} if before.get(key) != after.get(key)]


def _thresholds(why: str, was: Config, config: Config, step: int) -> list[str]:
    if not why:
        return []
    builtin = {"static", "hi", "lo", "id", "did"}
    kinds = {was.clip.schedule, config.clip.schedule}
    if kinds <= builtin:
        old, new = _bounds(was, step), _bounds(config, step)
        if old == new:
            return []
        return [f"{why}: the bounds of the ratio jump at step {step + 1}: {old} -> {new}"]
    if kinds == {"od"}:
        old, new = (_turning_point(one.clip, step / one.train.steps) for one in (was, config))
        if old == new:
            return []
        return [
            f"{why}: from step {step + 1} on entropy is lowered above {new:.3g} instead of "
            f"{old:.3g} times the first"
        ]
    if kinds == {"target"} and "clip.target" in why.split(", "):
        return [
            f"{why}: from step {step + 1} on entropy is steered to another curve; shares are still "
            "of the run's first entropy"
        ]
    if len(kinds) == 1:
        return [f"{why}: the schedule {config.clip.schedule} goes on, in its own way, under these"]
    return [
        f"{why}: a schedule begins anew at step {step + 1}; what it measures first, such as the "
        "entropy that od and target are held to, is measured there"
    ]


def _bounds(config: Config, step: int) -> str:
    from megatron_gpc.algo.schedules import PhaseSchedule  # torch: not for every start

    bounds = PhaseSchedule(config.clip, config.train.steps).bounds(step, math.nan)
    return ", ".join(
        f"[{1 - bounds.eps_low_at(p):.3f}, {1 + bounds.eps_high_at(p):.3f}] at p = {p:g}"
        for p in (0.0, 1.0)
    )


def _turning_point(clip: ClipConfig, done: float) -> float:
    """Entropy above which od lowers it, as a share of the first; see algo/schedules.py."""
    return clip.od_floor + (1 - clip.od_floor) * (1 - done)


def _learning_rate(why: str, was: Config, config: Config, step: int) -> list[str]:
    updates = step * was.train.mini_batches * was.train.epochs
    old, new = learning_rate(was, updates), learning_rate(config, updates)
    if not why or math.isclose(old, new, rel_tol=1e-9):
        return []
    return [f"{why}: the learning rate jumps at step {step + 1}: {old:.3g} -> {new:.3g}"]


def learning_rate(config: Config, updates: int) -> float:
    """Of the update after `updates` ones, as megatron-core's OptimizerParamScheduler has it."""
    o, t = config.optim, config.train
    end = max(t.steps * t.mini_batches * t.epochs, o.warmup_updates + 1)
    if updates <= o.warmup_updates > 0:
        return o.lr * updates / o.warmup_updates
    if o.decay == "constant":
        return o.lr
    done = min((updates - o.warmup_updates) / (end - o.warmup_updates), 1.0)
    left = 1 - done if o.decay == "linear" else 0.5 * (math.cos(math.pi * done) + 1)
    return o.min_lr + left * (o.lr - o.min_lr)
