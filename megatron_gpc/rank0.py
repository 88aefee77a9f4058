"""What rank 0 does beside training: the rollout server, prompts, metrics, console, plots.

On every other rank the same calls do nothing and give None, so that the loop reads the same on all
ranks and no collective hides behind an `if`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from megatron_gpc.algo.advantages import group_advantages
from megatron_gpc.batching import pack
from megatron_gpc.config import Config, RolloutConfig
from megatron_gpc.errors import UserError
from megatron_gpc.layout import hf_folder, is_converted
from megatron_gpc.metrics.console import Console
from megatron_gpc.metrics.plots import plot_run
from megatron_gpc.metrics.tables import print_table, summary_table
from megatron_gpc.metrics.writer import MetricsWriter
from megatron_gpc.rewards import verifier
from megatron_gpc.rollout.collector import Collector, distinct_right
from megatron_gpc.rollout.launcher import EmbeddedServer
from megatron_gpc.rollout.prompts import PromptSource, read_prompts
from megatron_gpc.rollout.samples import read_samples, write_samples
from megatron_gpc.rundir import lock
from megatron_gpc.types import RolloutBatch, Sample, TrainState
from megatron_gpc.weights import MegatronReader, carry_over, hf_tensors, write_single


class Rank0:
    """The one process that talks to the outside."""

    def __init__(self, config: Config, active: bool):
        self.config = config
        self.active = active
        self.sync_dir = config.run_dir / "sync"
        self.hf = hf_folder(config.model.hf)

    def __enter__(self) -> Rank0:
        """Read prompts and start the rollout server, while the other ranks build their model.

        Raises:
            UserError: prompts, tokenizer or verifier cannot be used.
            RuntimeError: the server did not start.
        """
        if not self.active:
            return self
        from transformers import AutoTokenizer  # seconds of import, which only rank 0 spends

        config, self._stack = self.config, ExitStack()
        try:
            self._stack.enter_context(lock(config))
            tokenizer = AutoTokenizer.from_pretrained(self.hf, local_files_only=True)

            def tokenize(text: str) -> list[int]:
                return tokenizer(text, add_special_tokens=False)["input_ids"]

            self.source = PromptSource(read_prompts(config.data.prompts, tokenize), config.seed)
            self.held_out = (
                read_prompts(config.eval.prompts, tokenize) if config.eval.prompts else []
            )
            if config.rollout.replay is None:
                self._start_rollouts(tokenizer)
        except BaseException:
            self._stack.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        if self.active:
            self._stack.close()

    def _start_rollouts(self, tokenizer: Any) -> None:
        judge = verifier(self.config.data.verifier)
        server = self.config.rollout.server
        url = server.url
        if url is None:
            embedded = EmbeddedServer(
                self._servable(),
                self.config.run_dir / "logs" / "server.log",
                start_timeout_s=server.start_timeout_s,
            )
            url = self._stack.enter_context(embedded).url
        self.collector = Collector(
            self.config, url, judge, tokenizer.decode, [tokenizer.eos_token_id]
        )
        self._stack.callback(self.collector.close)

    def _servable(self) -> Path:
        """A folder that a rollout server can start from; for a converted checkpoint it is made."""
        if not is_converted(self.config.model.hf):
            return self.hf
        self.sync_dir.mkdir(exist_ok=True)
        carry_over(self.hf, self.sync_dir)
        write_single(self.sync_dir, hf_tensors(MegatronReader(self.config.model.hf), self.hf))
        return self.sync_dir

    def begin(self, state: TrainState) -> None:
        """Continue prompts and metrics where `state` left off."""
        if self.active:
            self.source.cursor = state.prompt_cursor
            self.sync_dir.mkdir(exist_ok=True)
            carry_over(self.hf, self.sync_dir)
            self.metrics = self._stack.enter_context(MetricsWriter(self.config.run_dir, state.step))
            self.console = self._stack.enter_context(Console(self.config.train.steps, state.step))

    def hand_over(self, tensors: Iterable[tuple[str, torch.Tensor]], version: int) -> None:
        """Give the rollout server the policy's weights; every rank enters (they are gathered)."""
        if self.config.rollout.replay:
            return
        if not self.active:
            for _ in tensors:
                pass
            return
        if self.config.rollout.server.sync == "disk":
            write_single(self.sync_dir, tensors)
            self.collector.hand_over(self.sync_dir, None, version)
        else:
            self.collector.hand_over(self.sync_dir, dict(tensors), version)

    def rollout(self, step: int) -> tuple[RolloutBatch, int] | None:
        """Sample, judge and pack the prompts of a training step; and the prompt cursor after it."""
        if not self.active:
            return None
        rollout, cursor = self.config.rollout, self.source.cursor
        if rollout.replay:
            samples, _ = read_samples(rollout.replay, step)
            _check_groups(samples, rollout)
        else:
            prompts = self.source.take(rollout.prompts_per_step)
            samples = self.collector.sample(prompts, rollout.group_size, f"step {step}")
            cursor = self.source.cursor
            _check_versions(samples, step)
        rewards_N = torch.tensor([s.reward for s in samples])
        group_N = torch.arange(len(samples)) // rollout.group_size
        advantages_N = group_advantages(rewards_N, group_N, self.config.train.advantage)
        if rollout.save_samples:
            write_samples(self.config.run_dir, step, samples, advantages_N.tolist())
        return pack(samples, rollout.group_size, advantages_N), cursor

    def evaluate_if_due(self, step: int) -> None:
        """Sample held-out prompts before the first, after the last, and every eval.every steps."""
        every = self.config.eval.every
        due = step in (0, self.config.train.steps) or (every > 0 and step % every == 0)
        if not (self.active and self.held_out and due) or self.config.rollout.replay:
            return
        count = self.config.eval.samples
        samples = self.collector.sample(self.held_out, count, "eval")
        self.metrics.write_evaluation(
            step,
            {
                "eval_reward": sum(s.reward for s in samples) / len(samples),
                "eval_distinct_right": distinct_right(samples, count),
            },
        )

    def log(self, step: int, values: dict[str, Any]) -> None:
        """One line of metrics.jsonl, TensorBoard, console."""
        if self.active:
            self.metrics.write(step, values)
            self.console.step(step, values)

    def finish(self) -> None:
        """Plot the run and print its table."""
        if self.active:
            self.console.close()
            plot_run(self.config.run_dir)
            print_table(summary_table(self.config.run_dir))


def _check_versions(samples: Sequence[Sample], step: int) -> None:
    found = {version for sample in samples for version, _, _ in sample.weight_versions}
    stale = found - {str(step - 1)}
    if stale:
        raise RuntimeError(
            f"step {step}: samples made by weights {sorted(stale)}, expected only "
            f"{step - 1}; does someone else use this rollout server?"
        )


def _check_groups(samples: Sequence[Sample], rollout: RolloutConfig) -> None:
    """Hold replayed samples to the configured groups.

    Raises:
        UserError: they were saved by a run with other groups.
    """
    wanted = rollout.prompts_per_step, rollout.group_size
    indices = [sample.sample_index for sample in samples]
    if indices != list(range(wanted[1])) * wanted[0]:
        raise UserError(
            f"rollout.replay: {rollout.replay}: its {len(samples)} samples are not "
            f"prompts_per_step = {wanted[0]} groups of group_size = {wanted[1]}; give both the "
            "values of that run"
        )
