"""What rank 0 does beside training: the rollout server, prompts, metrics, console, plots.

On every other rank the same calls do nothing and give None, so that the loop reads the same on all
ranks and no collective hides behind an `if`.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from megatron_gpc.algo.advantages import group_advantages
from megatron_gpc.batching import pack
from megatron_gpc.config import Config
from megatron_gpc.guard import save_mini_batch
from megatron_gpc.layout import hf_folder, is_converted
from megatron_gpc.metrics.console import Console
from megatron_gpc.metrics.plots import plot_run
from megatron_gpc.metrics.tables import print_table, summary_table
from megatron_gpc.metrics.writer import MetricsWriter
from megatron_gpc.rewards import verifier
from megatron_gpc.rollout.collector import Collector, distinct_right
from megatron_gpc.rollout.launcher import EmbeddedServer
from megatron_gpc.rollout.prompts import PromptSource, read_prompts
from megatron_gpc.rundir import lock
from megatron_gpc.types import Bounds, RolloutBatch, TrainState
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
            judge = verifier(config.data.verifier)
            url = config.rollout.server.url
            if url is None:
                server = self._stack.enter_context(
                    EmbeddedServer(
                        self._servable(),
                        config.run_dir / "logs" / "server.log",
                        start_timeout_s=config.rollout.server.start_timeout_s,
                    )
                )
                url = server.url
            self.collector = Collector(
                config, url, judge, tokenizer.decode, [tokenizer.eos_token_id]
            )
            self._stack.callback(self.collector.close)
        except BaseException:
            self._stack.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        if self.active:
            self._stack.close()

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
        rollout = self.config.rollout
        samples = self.collector.sample(
            self.source.take(rollout.prompts_per_step), rollout.group_size, f"step {step}"
        )
        stale = {s.weight_version for s in samples} - {str(step - 1)}
        if stale:
            raise RuntimeError(
                f"step {step}: samples made by weights {sorted(stale)}, expected only "
                f"{step - 1}; does someone else use this rollout server?"
            )
        rewards_N = torch.tensor([s.reward for s in samples])
        group_N = torch.arange(len(samples)) // rollout.group_size
        advantages_N = group_advantages(rewards_N, group_N, self.config.train.advantage)
        return pack(samples, rollout.group_size, advantages_N), self.source.cursor

    def evaluate_if_due(self, step: int) -> None:
        """Sample held-out prompts before the first, after the last, and every eval.every steps."""
        every = self.config.eval.every
        due = step in (0, self.config.train.steps) or (every > 0 and step % every == 0)
        if not (self.active and self.held_out and due):
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

    def keep_skipped(
        self,
        file: Path,
        batch: RolloutBatch,
        samples: list[int],
        old_logp_T: torch.Tensor,
        bounds: Bounds,
    ) -> None:
        """Save the mini-batch of an update that was left out, and say so."""
        if self.active:
            save_mini_batch(file, batch, samples, old_logp_T, bounds)
            self.console.warn(
                f"loss or gradient is not finite: the update was left out; its mini-batch: {file}"
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
