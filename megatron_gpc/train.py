"""THE LOOP: what one rank does, from the first rollout to the last checkpoint."""

from __future__ import annotations

from megatron_gpc.algo.advantages import group_advantages
from megatron_gpc.algo.correction import correction_weights
from megatron_gpc.algo.schedules import CheckedSchedule
from megatron_gpc.batching import pack, token_streams
from megatron_gpc.config import Config
from megatron_gpc.mcore.checkpoint.checkpoints import Checkpoints
from megatron_gpc.mcore.main_rank import MainRank
from megatron_gpc.mcore.policy import Policy
from megatron_gpc.mcore.publisher import Publisher
from megatron_gpc.mcore.reference import Reference
from megatron_gpc.mcore.setup import on_any_rank, process_groups
from megatron_gpc.mcore.updates import Updates
from megatron_gpc.metrics.reporter import Reporter
from megatron_gpc.metrics.step import Clock, step_metrics
from megatron_gpc.rollout.sampler import TrainingSampler, keep_samples, sampler_of, trained_on
from megatron_gpc.run.lock import take
from megatron_gpc.run.stop import StopRequest
from megatron_gpc.run.watchdog import Watchdog
from megatron_gpc.types import RolloutBatch, TrainState


def train(config: Config, stop: StopRequest) -> bool:
    """Run the configured training on this rank; every rank calls it.

    Returns:
        False if the run was stopped early by `stop`, on any rank; what was done is saved then.
    """
    with process_groups(config), Watchdog(config) as watchdog, MainRank() as main:
        main.enter(take, config.run_dir)
        sampler = main.enter(sampler_of, config)
        policy = Policy.configured(config)
        checkpoints = Checkpoints(config, policy)
        state = checkpoints.start()
        reference = Reference.configured(policy)
        schedule = main.make(CheckedSchedule, config.clip, config.train.steps, state.controller)
        main(sampler.begin, state.sampling)
        reporter = main.enter(Reporter, config, state.step)
        publisher = Publisher(main, sampler, policy, reporter.evaluation)
        updates = Updates(policy, main, state.skipped, reporter.warn, watchdog.alive)
        saving = {"seconds_checkpoint": 0.0}

        while state.step < config.train.steps:
            if on_any_rank(stop.received is not None):
                checkpoints.before_end(state, lambda: main(sampler.state))
                main(reporter.stopped, state.step)
                return False
            step, clock = state.step + 1, Clock(watchdog.alive)
            stop.doing = f"saving at the end of step {step}"
            if not config.rollout.overlap:
                publisher.sync(state.step, clock)
            batch, sampled = publisher.ask(state.step, _sample, config, sampler, reporter, step)
            publisher.take_turn()
            clock.lap("seconds_rollout")
            if config.rollout.overlap:  # the next step's samples are made while this one trains
                publisher.sync(state.step, clock)
                main(sampler.start, step + 1)

            scored = policy.score(batch)
            old_logp_T = policy.old_logp(batch, scored)
            weights_T = correction_weights(batch, old_logp_T, config.train)
            reference_logp_T = reference.score(batch) if reference else None
            streams = token_streams(batch, old_logp_T, weights_T, reference_logp_T)
            streams = policy.prepare(streams, scored, step)
            bounds = main(schedule.thresholds, state.step, scored.entropy_T)
            said = main(schedule.metrics)
            updated = updates.make(step, batch, scored, streams, bounds)
            clock.lap("seconds_train")

            state = TrainState(step, {}, main(schedule.state), list(updates.skipped))
            measured = step_metrics(batch, scored, weights_T, bounds, clock) | saving
            main(reporter.step, step, {**said, **updated, **sampled, **measured})
            saving = checkpoints.after_step(state, lambda: main(sampler.state))

        stop.doing = "all steps are done and saved; the run ends by itself"
        publisher.sync(state.step, Clock(watchdog.alive))
        checkpoints.wait()
        main(reporter.finish)
        return True


def _sample(
    config: Config, sampler: TrainingSampler, reporter: Reporter, step: int
) -> tuple[RolloutBatch, dict[str, float]] | None:
    """On the main rank: a step's samples, packed, and what is to be said of them; None: the sampler
    needs the weights first."""
    rollout = sampler.collect(step)
    if rollout is None:
        return None
    rewards_N = rollout.rewards()  # each was judged as it ended, for filters need to know
    advantages_N = group_advantages(rewards_N, rollout.groups(), config.train.advantage)
    keep_samples(config, step, rollout, advantages_N)
    kept = trained_on(rollout.samples, config.rollout, step, reporter.warn)
    batch = pack([rollout.samples[n] for n in kept], advantages_N[kept])
    return batch, {"reward": float(rewards_N.double().mean()), **rollout.metrics}
