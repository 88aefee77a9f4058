"""What rank 0 does beside training: the rollout server, prompts, metrics, console, plots.

On every other rank the same calls do nothing and give None, so that the loop reads the same on all
ranks and no collective hides behind an `if`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from megatron_gpc.algo.advantages import group_advantages
from megatron_gpc.algo.schedules import CheckedSchedule
from megatron_gpc.batching import pack
from megatron_gpc.config import Config
from megatron_gpc.engines.colocation import Colocation
from megatron_gpc.engines.fleet import Fleet, WeightsNeeded
from megatron_gpc.engines.probe import Tolerance
from megatron_gpc.engines.starter import Starter
from megatron_gpc.engines.weight_sync import make_sync
from megatron_gpc.metrics.pass_at_k import pass_at_k, pass_ks
from megatron_gpc.metrics.reporter import Reporter
from megatron_gpc.rewards.judging import Judge
from megatron_gpc.rollout.collector import Collector
from megatron_gpc.rollout.evaluation import (
    as_evaluated,
    distinct_right,
    nucleus,
    right_P,
    score_means,
)
from megatron_gpc.rollout.prefetch import Prefetch
from megatron_gpc.rollout.prompt_reader import PromptReader
from megatron_gpc.rollout.prompts import PromptSource
from megatron_gpc.rollout.tokenizer import special_tokens
from megatron_gpc.run.lock import take
from megatron_gpc.run.say import say
from megatron_gpc.run.stop import mark
from megatron_gpc.run.watchdog import save_mini_batch
from megatron_gpc.types import Bounds, RolloutBatch, TokenStats, TokenStreams, TrainState
from megatron_gpc.weights import carry_over, check_weights, write_single
from megatron_gpc.weights.convert import hf_tensors
from megatron_gpc.weights.folders import hf_folder, is_converted
from megatron_gpc.weights.megatron_files import MegatronReader


class Rank0:
    """The one process that talks to the outside."""

    def __init__(self, config: Config, active: bool):
        self.config = config
        self.active = active
        self.colocated = config.rollout.server.colocated and config.rollout.replay is None
        """Whether engines and policy take turns on the GPUs; the same on every rank."""
        self.sync_dir = config.run_dir / "sync"
        self.hf = hf_folder(config.model.hf)

    def __enter__(self) -> Rank0:
        """Read prompts and start the engines, while the other ranks build their model.

        Raises:
            UserError: prompts, tokenizer or verifier cannot be used.
        """
        if not self.active:
            return self
        config, self._stack = self.config, ExitStack()
        try:
            self._stack.enter_context(take(config.run_dir))
            if config.rollout.replay:
                return self
            starter = Starter(
                config.rollout.server, config.sglang, self._servable(), config.run_dir / "logs"
            )
            say(starter.what_happens())
            self.engines = self._stack.enter_context(Fleet(starter))
            self._turns = Colocation(self.engines)
            files = filter(None, (config.data.prompts, config.eval.prompts))
            say(f"reading prompts: {', '.join(map(str, files))}")
            reader = PromptReader(config, config.model.hf)
            tokenizer, stops = reader.tokenizer, reader.stops
            say(stops.said)
            self.held_out = reader.held_out()
            parts = (
                self.engines,
                PromptSource(reader.training(), config.seed),
                Judge(config.data, special_tokens(tokenizer)),
                tokenizer.decode,
                stops.token_ids,
            )
            self.collector = Collector(config, *parts, stops.sampling)
            sampling = {**stops.sampling, **nucleus(config)}
            self.evaluator = Collector(as_evaluated(config), *parts, sampling)
        except BaseException:
            self._stack.close()
            raise
        return self

    def __exit__(self, *error: Any) -> None:
        if self.active:
            self._stack.__exit__(*error)

    def _servable(self) -> Path:
        """A folder that an engine can start from; for a converted checkpoint it is made.

        Raises:
            UserError: the checkpoint is damaged.
        """
        if not is_converted(self.config.model.hf):
            check_weights(self.hf)
            return self.hf
        self.sync_dir.mkdir(exist_ok=True)
        carry_over(self.hf, self.sync_dir)
        write_single(self.sync_dir, hf_tensors(MegatronReader(self.config.model.hf), self.hf))
        return self.sync_dir

    def make_room(self) -> None:
        """Before the policy is built: colocated engines start on GPUs that are theirs alone.

        Raises:
            ServerError: one did not start.
        """
        if self.active and self.colocated:
            self.engines.await_started()
            self._turns.rest()

    def begin(self, state: TrainState) -> None:
        """Continue schedule, prompts and metrics where `state` left off; wait for the engines.

        Raises:
            ServerError, RolloutError: an engine did not start or does not answer.
            UserError: the prompts are not those of the run.
        """
        if not self.active:
            return
        self._schedule = CheckedSchedule(self.config.clip, self.config.train.steps)
        if state.controller:
            self._schedule.restore(state.controller)
        if not self.config.rollout.replay:
            self._pending = Prefetch(self.engines, self.collector)
            if state.sampling:
                self._pending.restore(state.sampling)
        self.reporter = self._stack.enter_context(Reporter(self.config, state.step))
        if self.config.rollout.replay:
            return
        self.engines.await_started()
        self.sync_dir.mkdir(exist_ok=True)
        carry_over(self.hf, self.sync_dir)
        self.sync = make_sync(self.config.rollout.server, self.engines, self.sync_dir)
        self._stack.callback(self.sync.close)

    def thresholds(self, step: int, scored: TokenStats) -> tuple[Bounds, dict[str, Any]] | None:
        """Clip thresholds of the step after `step` finished ones, and the schedule's state then.

        A step without tokens has no entropy and no use for thresholds: the schedule is not asked,
        so that whatever it remembers is of what was measured.
        """
        if not self.active:
            return None
        self._schedule_said = {}
        if not len(scored.entropy_T):
            return Bounds(*(math.nan,) * 4), self._schedule.state()
        bounds = self._schedule.bounds(step, float(scored.entropy_T.double().mean()))
        self._schedule_said = self._schedule.metrics()
        return bounds, self._schedule.state()

    # ---- weights ----

    def hand_over(self, tensors: Iterable[tuple[str, torch.Tensor]], version: int) -> None:
        """Give the engines the policy's weights; every rank enters (they are gathered)."""
        if self.config.rollout.replay:
            return
        if not self.active:
            for _ in tensors:
                pass
            return
        if self.colocated:
            self._turns.take_weights()
        self.engines.await_alive()
        self.sync.push(tensors, str(version))
        if self.colocated:
            self._turns.take_cache()

    def probe(self) -> tuple[RolloutBatch | None, bool]:
        """A few tokens of every engine that has the weights, and whether one has.

        The first is None where no engine has, or where none is to be asked (probe_tokens=0).
        """
        if not self.active or not self.engines.ready():
            return None, False
        if self.config.rollout.server.probe_tokens == 0:
            return None, True
        samples = self.engines.run(self.collector.probe())
        return (pack(samples, torch.zeros(len(samples))) if samples else None), False

    def convinced(self, probe: RolloutBatch, scored: TokenStats) -> bool:
        """Whether engines answer as the trainer would; one that does not is taken out."""
        if not self.active:
            return False
        gap_T = (scored.logp_T - probe.rollout_logp_T).abs()
        gaps = [gap_T[probe.response_slice(n)].tolist() for n in range(probe.num_samples)]
        return self.engines.check_probe(gaps, Tolerance.of(self.config))

    def give_up(self, version: int) -> None:
        """End the run: engines have not taken the weights.

        Raises:
            ServerUnavailable: says what was wrong with each.
        """
        if self.active:
            raise self.engines.lost(f"weights {version} could not be handed over")

    # ---- samples ----

    def start_rollout(self, step: int) -> None:
        """Begin to sample for a training step; `rollout` waits for it."""
        if self.active and not self.config.rollout.replay and step <= self.config.train.steps:
            self._pending.start(step)

    def rollout(self, step: int) -> tuple[RolloutBatch, dict[str, float]] | None:
        """Sample, judge and pack the prompts of a training step, and what is to be said of them.

        None on other ranks, and where the engines need the weights first.
        """
        if not self.active:
            return None
        config = self.config.rollout
        if config.replay:
            from megatron_gpc.rollout.samples import check_groups, read_samples  # pyarrow: 0.3 s

            saved = read_samples(config.replay, step)
            check_groups(saved, config)
            samples, positions, metrics = saved.samples, saved.positions, {}
        else:
            found = self._pending.result(step)
            if found is None:
                return None
            samples, positions, metrics = found.samples, found.positions, found.metrics
        rewards_N = torch.tensor([s.reward for s in samples])
        group_N = torch.arange(len(samples)) // config.group_size
        advantages_N = group_advantages(rewards_N, group_N, self.config.train.advantage)
        metrics = {
            "reward": float(rewards_N.double().mean()),
            "weight_version": max(int(v) for s in samples for v, _, _ in s.weight_versions),
            **metrics,
        }
        if config.save_samples:
            from megatron_gpc.rollout.samples import SavedStep, write_samples

            saved = SavedStep(samples, positions, advantages_N.tolist())
            write_samples(self.config.run_dir, step, saved)
        if config.overlong == "drop":
            kept = [n for n, s in enumerate(samples) if s.finish_reason != "length"]
            samples, advantages_N = [samples[n] for n in kept], advantages_N[kept]
            if not samples:
                self.console.warn(
                    f"step {step}: every response was cut at rollout.max_response_tokens="
                    f"{config.max_response_tokens}, and rollout.overlong=drop leaves nothing to "
                    "train on: no update"
                )
        return pack(samples, advantages_N), metrics

    def rest_engines(self) -> None:
        """Colocated: the engines give up their memory; the policy trains next."""
        if self.active:
            self._turns.rest()

    def sampling_state(self) -> dict[str, Any]:
        """What the next steps' samples depend on; waits for a rollout that is under way."""
        if not self.active or self.config.rollout.replay:
            return {}
        return self._pending.state()

    def evaluate_if_due(self, step: int) -> bool:
        """Sample held-out prompts before the first, after the last, and every eval.every steps.

        False: it is due, but the engines need the weights first.
        """
        every = self.config.eval.every
        due = step in (0, self.config.train.steps) or (every > 0 and step % every == 0)
        if not (self.active and due) or self.config.rollout.replay or not self.held_out:
            return True
        count = self.config.eval.samples
        say(f"step {step}: evaluating {len(self.held_out)} x {count} held-out samples")
        try:
            samples = self.engines.run(self.evaluator.sample(self.held_out, count, "eval"))
        except WeightsNeeded:
            return False
        right, ks = right_P(samples, count), pass_ks(self.config.eval)
        self.reporter.evaluation(
            step,
            {
                "eval_reward": sum(s.reward for s in samples) / len(samples),
                "eval_distinct_right": distinct_right(samples, count),
                **score_means(samples, "eval_reward_"),
                **{f"eval_pass_at_{k}": pass_at_k(right, count, k) for k in ks},
            },
        )
        return True

    def keep_skipped(
        self,
        file: Path,
        batch: RolloutBatch,
        samples: list[int],
        streams: TokenStreams,
        bounds: Bounds,
    ) -> None:
        """Save the mini-batch of an update that was left out, and say so."""
        if self.active:
            save_mini_batch(file, batch, samples, streams, bounds)
            self.reporter.warn(
                f"loss or gradient is not finite: the update was left out; its mini-batch: {file}"
            )

    def log(self, step: int, values: dict[str, Any]) -> None:
        """Report a training step."""
        if self.active:
            self.reporter.step(step, {**self._schedule_said, **values})

    def stopped(self, step: int) -> None:
        """Say that the run was asked to end, did so after `step`, and can be continued."""
        if self.active:
            self.reporter.pause()
            mark(self.config.run_dir, step)
            say(f"stopped after step {step}, everything is saved; the same command continues")

    def finish(self) -> None:
        """Plot the run and print its table."""
        if self.active:
            self.reporter.finish()
