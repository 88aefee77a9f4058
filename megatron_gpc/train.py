"""THE LOOP: what one rank does, from the first rollout to the last checkpoint."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

from megatron_gpc.algo.regions import region_masks
from megatron_gpc.algo.schedules import make_schedule
from megatron_gpc.batching import mini_batches
from megatron_gpc.config import Config
from megatron_gpc.guard import SkippedUpdates, Watchdog
from megatron_gpc.layout import is_converted, read_hf_config
from megatron_gpc.mcore.checkpoint import Checkpoints, load_weights
from megatron_gpc.mcore.policy import UPDATE_MAXIMA, UPDATE_MEANS, Policy
from megatron_gpc.mcore.setup import device, from_main, is_main, process_groups
from megatron_gpc.mcore.weights import Exporter, load_hf
from megatron_gpc.metrics.reduce import Sums
from megatron_gpc.rank0 import Rank0
from megatron_gpc.types import Bounds, RolloutBatch, TokenStats, TrainState
from megatron_gpc.weights import Param, family_of, places_of


def train(config: Config) -> None:
    """Run the configured training on this rank; every rank calls it."""
    with (
        process_groups(config),
        Watchdog(config) as watchdog,
        Rank0(config, is_main()) as rank0,
    ):
        watchdog.alive()
        hf = read_hf_config(config.model.hf)
        family = family_of(hf)
        params = family.params(hf, config.parallel.tp)
        policy = Policy(config, family.model_fields(hf))
        checkpoints = Checkpoints(config, policy)
        state = checkpoints.resume()
        if state is None:
            state = _start(config, policy, hf, params)
        schedule = make_schedule(config.clip, config.train.steps)
        if state.controller:
            schedule.restore(state.controller)
        skipped = SkippedUpdates(config, state.skipped)
        exporter = Exporter(policy.models, params)
        rank0.begin(state)

        while state.step < config.train.steps:
            clock = Clock(watchdog.alive)
            rank0.hand_over(exporter.tensors(), version=state.step)
            clock.lap("seconds_sync")
            rank0.evaluate_if_due(state.step)
            clock.lap("seconds_evaluation")
            batch, prompt_cursor = from_main(rank0.rollout(step=state.step + 1))
            clock.lap("seconds_rollout")

            scored = policy.score(batch)
            old_logp_T = batch.rollout_logp_T
            if config.train.old_logprobs == "trainer":
                old_logp_T = scored.logp_T
            bounds = schedule.bounds(state.step, float(scored.entropy_T.double().mean()))
            sums = Sums((*UPDATE_MEANS, "grad_norm"), UPDATE_MAXIMA, device())
            updates = mini_batches(
                batch.num_samples,
                config.train.mini_batches,
                config.train.epochs,
                config.seed,
                state.step + 1,
            )
            for number, samples in enumerate(updates, start=1):
                updated = policy.update(batch, samples, old_logp_T, bounds, sums)
                watchdog.alive()
                if updated["skipped"]:
                    file = skipped.add(state.step + 1, number)
                    rank0.keep_skipped(file, batch, samples, old_logp_T, bounds)
                    skipped.check()
                else:
                    sums.add("grad_norm", updated["grad_norm"], 1)
            metrics = sums.reduce()
            clock.lap("seconds_train")

            state = TrainState(state.step + 1, prompt_cursor, schedule.state(), list(skipped.names))
            rank0.log(
                state.step,
                {
                    **metrics,
                    **rollout_metrics(batch, scored),
                    **bounds_metrics(bounds),
                    **clock.metrics(batch.num_response_tokens),
                    "learning_rate": updated["learning_rate"],
                    "skipped_updates": len(skipped.names),
                    "weight_version": state.step - 1,
                },
            )
            checkpoints.poll()
            if _checkpoint_due(config, state.step):
                checkpoints.save(state)

        rank0.hand_over(exporter.tensors(), version=state.step)
        watchdog.alive()
        rank0.evaluate_if_due(state.step)
        watchdog.alive()
        checkpoints.wait()
        watchdog.alive()
        rank0.finish()


def _start(
    config: Config, policy: Policy, hf: dict[str, Any], params: Sequence[Param]
) -> TrainState:
    """Take the weights of model.hf, a Hugging Face folder or a converted checkpoint."""
    family = family_of(hf)
    if is_converted(config.model.hf):
        found = places_of(params, family.model_fields(hf))
        load_weights(config.model.hf, policy.models, found)
    else:
        load_hf(policy.models, params, config.model.hf, family.copies(hf))
    policy.weights_changed()
    return TrainState()


def _checkpoint_due(config: Config, step: int) -> bool:
    every = config.checkpoint.every
    return step == config.train.steps or (every > 0 and step % every == 0)


def rollout_metrics(batch: RolloutBatch, scored: TokenStats) -> dict[str, float]:
    """What the step's samples say before any update; means over all response tokens.

    Computed from globally reduced values, so every rank gets the same numbers.
    """
    advantages_T = batch.advantages_N.repeat_interleave(batch.response_lengths_N)
    regions = region_masks(scored.logp_T, scored.entropy_T, advantages_T)
    gap_T = (scored.logp_T - batch.rollout_logp_T).abs().double()
    return {
        "reward": float(batch.rewards_N.double().mean()),
        "entropy": float(scored.entropy_T.double().mean()),
        "response_length": float(batch.response_lengths_N.double().mean()),
        "logp_gap_mean": float(gap_T.mean()),
        "logp_gap_max": float(gap_T.max()),
        **{f"share_e{i}": float(mask.double().mean()) for i, mask in enumerate(regions, start=1)},
    }


def bounds_metrics(bounds: Bounds) -> dict[str, float]:
    """The thresholds at three probabilities."""
    at = {"p0": 0.0, "p05": 0.5, "p1": 1.0}
    return {f"eps_high_at_{name}": bounds.eps_high_at(p) for name, p in at.items()} | {
        f"eps_low_at_{name}": bounds.eps_low_at(p) for name, p in at.items()
    }


class Clock:
    """Seconds of each part of a training step.

    Args:
        on_lap: called at the end of each part, and at the beginning.
    """

    def __init__(self, on_lap: Callable[[], None]) -> None:
        on_lap()
        self.on_lap = on_lap
        self.last = time.perf_counter()
        self.laps: dict[str, float] = {}

    def lap(self, name: str) -> None:
        now = time.perf_counter()
        self.laps[name] = now - self.last
        self.last = now
        self.on_lap()

    def metrics(self, tokens: int) -> dict[str, float]:
        """The laps, and response tokens per second of the step, evaluation left out."""
        seconds = sum(self.laps.values()) - self.laps["seconds_evaluation"]
        return {**self.laps, "tokens_per_second": tokens / seconds}
