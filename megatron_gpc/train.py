"""THE LOOP: what one rank does, from the first rollout to the last checkpoint."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from megatron_gpc.algo.correction import correction_weights
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

HAND_OVERS = 3
"""How often weights are handed over before the run gives up on its engines."""


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
        engines = Handover(config, rank0, exporter, policy)

        while state.step < config.train.steps:
            clock = Clock(watchdog.alive)
            if not config.rollout.overlap:
                engines.refresh(state.step, clock)
            batch, rollout_metrics = engines.rollout(state.step + 1)
            clock.lap("seconds_rollout")
            if config.rollout.overlap:  # the next step's samples are made while this one trains
                engines.refresh(state.step, clock)
                rank0.start_rollout(state.step + 2)

            scored = policy.score(batch)
            old_logp_T = batch.rollout_logp_T
            if config.train.old_logprobs == "trainer":
                old_logp_T = scored.logp_T
            weights_T = correction_weights(
                old_logp_T,
                batch.rollout_logp_T,
                batch.response_lengths_N,
                config.train.correction,
                config.train.correction_level,
                config.train.correction_cap,
            )
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
                updated = policy.update(batch, samples, old_logp_T, weights_T, bounds, sums)
                watchdog.alive()
                if updated["skipped"]:
                    file = skipped.add(state.step + 1, number)
                    rank0.keep_skipped(file, batch, samples, old_logp_T, bounds)
                    skipped.check()
                else:
                    sums.add("grad_norm", updated["grad_norm"], 1)
            metrics = sums.reduce()
            clock.lap("seconds_train")

            state = TrainState(
                state.step + 1, controller=schedule.state(), skipped=list(skipped.names)
            )
            rank0.log(
                state.step,
                {
                    **metrics,
                    **rollout_metrics,
                    **batch_metrics(batch, scored, weights_T),
                    **bounds_metrics(bounds),
                    **clock.metrics(batch.num_response_tokens),
                    "learning_rate": updated["learning_rate"],
                    "skipped_updates": len(skipped.names),
                },
            )
            checkpoints.poll()
            if _checkpoint_due(config, state.step):
                sampling = from_main(rank0.sampling_state())
                checkpoints.save(dataclasses.replace(state, sampling=sampling))

        engines.refresh(state.step, Clock(watchdog.alive))
        checkpoints.wait()
        watchdog.alive()
        rank0.finish()


class Handover:
    """Weights to the engines and samples back, as collectives that every rank enters."""

    def __init__(self, config: Config, rank0: Rank0, exporter: Exporter, policy: Policy):
        self.config, self.rank0, self.exporter, self.policy = config, rank0, exporter, policy
        self.version: int | None = None

    def refresh(self, version: int, clock: Clock) -> None:
        """Give the engines these weights where they have others; evaluate where that is due."""
        if version != self.version:
            self._hand_over(version)
        clock.lap("seconds_sync")
        while not from_main(self.rank0.evaluate_if_due(version)):
            self._hand_over(version)
        clock.lap("seconds_evaluation")

    def rollout(self, step: int) -> tuple[RolloutBatch, dict[str, float]]:
        """A training step's samples; weights are handed over where no engine has them any more."""
        found = from_main(self.rank0.rollout(step))
        while found is None:
            self._hand_over(step - 1)
            found = from_main(self.rank0.rollout(step))
        return found

    def _hand_over(self, version: int) -> None:
        for _ in range(HAND_OVERS):
            self.rank0.hand_over(self.exporter.tensors(), version)
            if self._convinced():
                self.version = version
                return
        from_main(self.rank0.give_up(version))

    def _convinced(self) -> bool:
        """Whether an engine answers with the policy's own log-probs."""
        if self.config.rollout.replay:
            return True
        probe, ready = from_main(self.rank0.probe())
        if probe is None:
            return ready
        return from_main(self.rank0.convinced(probe, self.policy.score(probe)))


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


def batch_metrics(
    batch: RolloutBatch, scored: TokenStats, weights_T: torch.Tensor
) -> dict[str, float]:
    """What the step's samples say before any update; means over all response tokens.

    Computed from globally reduced values, so every rank gets the same numbers.
    """
    advantages_T = batch.advantages_N.repeat_interleave(batch.response_lengths_N)
    regions = region_masks(scored.logp_T, scored.entropy_T, advantages_T)
    gap_T = (scored.logp_T - batch.rollout_logp_T).abs().double()
    return {
        "entropy": float(scored.entropy_T.double().mean()),
        "response_length": float(batch.response_lengths_N.double().mean()),
        "logp_gap_mean": float(gap_T.mean()),
        "logp_gap_max": float(gap_T.max()),
        "correction_mean": float(weights_T.double().mean()),
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
