"""THE LOOP: what one rank does, from the first rollout to the last checkpoint."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_gpc.algo.correction import correction_weights
from megatron_gpc.batching import mini_batches, token_streams
from megatron_gpc.config import Config
from megatron_gpc.handover import Handover
from megatron_gpc.mcore.checkpoint.checkpoints import Checkpoints, load_weights
from megatron_gpc.mcore.entropy_change import EntropyChange
from megatron_gpc.mcore.policy import UPDATE_MAXIMA, Policy
from megatron_gpc.mcore.reference import Reference
from megatron_gpc.mcore.setup import device, from_main, is_main, on_any_rank, process_groups
from megatron_gpc.mcore.weights import Exporter, load_hf
from megatron_gpc.metrics.reduce import Sums
from megatron_gpc.metrics.step import Clock, batch_metrics, bounds_metrics
from megatron_gpc.rank0 import Rank0
from megatron_gpc.run.say import say
from megatron_gpc.run.stop import StopRequest
from megatron_gpc.run.watchdog import SkippedUpdates, Watchdog
from megatron_gpc.types import TrainState
from megatron_gpc.weights import Param, family_of, places_of
from megatron_gpc.weights.folders import is_converted, read_hf_config


def train(config: Config, stop: StopRequest) -> bool:
    """Run the configured training on this rank; every rank calls it.

    Returns:
        Whether it came to its end; False if it was stopped early by `stop`, on any rank.  What was
        done is saved then.
    """
    with (
        process_groups(config),
        Watchdog(config) as watchdog,
        Rank0(config, is_main()) as rank0,
    ):
        watchdog.alive()
        from_main(rank0.make_room())
        hf = read_hf_config(config.model.hf)
        family = family_of(hf)
        params = family.params(hf, config.parallel.tp)
        policy = Policy(config, family.model_fields(hf))
        checkpoints = Checkpoints(config, policy)
        state = checkpoints.resume()
        if state is None:
            _load(config.model.hf, policy, hf, params)
            policy.weights_changed()
            state = TrainState()
        reference = None
        if config.kl.coef > 0:
            folder = config.kl.reference or config.model.hf
            reference = Reference(policy, lambda: _load(folder, policy, hf, params))
        skipped = SkippedUpdates(config, state.skipped)
        exporter = Exporter(policy.models, params)
        rank0.begin(state)
        engines = Handover(config, rank0, exporter, policy)
        saved_step, seconds_checkpoint = state.step, 0.0

        while state.step < config.train.steps:
            if on_any_rank(stop.received is not None):
                if saved_step != state.step:
                    _save(checkpoints, rank0, state)
                checkpoints.wait()
                from_main(rank0.stopped(state.step))  # no rank ends before it is written down
                return False
            stop.doing = f"saving at the end of step {state.step + 1}"
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
            reference_logp_T = reference.score(batch) if reference else None
            streams = token_streams(batch, old_logp_T, weights_T, reference_logp_T)
            if policy.objective.prepares and batch.num_response_tokens:
                streams = from_main(  # the same on every rank, whatever it draws
                    policy.objective.prepare(streams, scored, state.step + 1, config.seed)
                )
            bounds, controller = from_main(rank0.thresholds(state.step, scored))
            sums = Sums((*policy.update_means, "grad_norm"), UPDATE_MAXIMA, device())
            updates = mini_batches(
                batch.num_samples,
                config.train.mini_batches,
                config.train.epochs,
                config.seed,
                state.step + 1,
            )
            change = None
            if config.diagnostics.entropy_change:
                change = EntropyChange(policy, batch, scored)
            made = 0
            for number, samples in enumerate(updates, start=1):
                updated = policy.update(batch, samples, streams, bounds, sums)
                watchdog.alive()
                if updated["skipped"]:
                    file = skipped.add(state.step + 1, number)
                    rank0.keep_skipped(file, batch, samples, streams, bounds)
                    skipped.check()
                elif not updated["empty"]:
                    made += 1
                    sums.add("grad_norm", updated["grad_norm"], 1)
            metrics = sums.reduce() | (change.metrics() if change else {})
            clock.lap("seconds_train")

            state = TrainState(state.step + 1, controller=controller, skipped=list(skipped.names))
            rank0.log(
                state.step,
                {
                    **metrics,
                    **rollout_metrics,
                    **batch_metrics(batch, scored, weights_T),
                    **bounds_metrics(bounds),
                    **clock.metrics(batch.num_response_tokens),
                    "learning_rate": updated["learning_rate"],
                    "updates": made,
                    "skipped_updates": len(skipped.names),
                    "seconds_checkpoint": seconds_checkpoint,
                },
            )
            clock = Clock(watchdog.alive)
            checkpoints.poll()
            if _checkpoint_due(config, state.step):
                _save(checkpoints, rank0, state)
                saved_step = state.step
            clock.lap("seconds_checkpoint")
            seconds_checkpoint = clock.laps["seconds_checkpoint"]

        stop.doing = "all steps are done and saved; the run ends by itself"
        engines.refresh(state.step, Clock(watchdog.alive))
        checkpoints.wait()
        watchdog.alive()
        rank0.finish()
        return True


def _load(folder: Path, policy: Policy, hf: dict[str, Any], params: Sequence[Param]) -> None:
    """Put a checkpoint's weights into the network: a Hugging Face folder's or a converted one's."""
    say(f"reading the weights of {folder}")
    family = family_of(hf)
    if is_converted(folder):
        load_weights(folder, policy.models, places_of(params, family.model_fields(hf)))
    else:
        load_hf(policy.models, params, folder, family.copies(hf))


def _save(checkpoints: Checkpoints, rank0: Rank0, state: TrainState) -> None:
    sampling = from_main(rank0.sampling_state())
    checkpoints.save(dataclasses.replace(state, sampling=sampling))


def _checkpoint_due(config: Config, step: int) -> bool:
    every = config.checkpoint.every
    return step == config.train.steps or (every > 0 and step % every == 0)
