"""The updates of one training step, and those that are left out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch

from megatron_gpc.batching import mini_batches
from megatron_gpc.errors import RunStopped
from megatron_gpc.mcore.entropy_change import EntropyChange
from megatron_gpc.mcore.main_rank import MainRank
from megatron_gpc.mcore.policy import UPDATE_MAXIMA, Policy
from megatron_gpc.mcore.setup import device
from megatron_gpc.mcore.signal_share import signal_share
from megatron_gpc.metrics.reduce import Sums
from megatron_gpc.run.files import name_of_step, replacing
from megatron_gpc.types import Bounds, RolloutBatch, TokenStats, TokenStreams


class Updates:
    """Makes the updates of training steps.  Every rank has one and calls the same.

    Args:
        policy: what they change.
        main: saves the mini-batches of updates that are left out.
        skipped: names of those that the run left out before, `TrainState.skipped`.
        warn: on the main rank, tells the user of one.
        alive: is called after each update.
    """

    def __init__(
        self,
        policy: Policy,
        main: MainRank,
        skipped: list[str],
        warn: Callable[[str], None],
        alive: Callable[[], None],
    ):
        self.policy, self.main, self.warn, self.alive = policy, main, warn, alive
        self.skipped = list(skipped)
        """Names of all updates that the run has left out."""

    def make(
        self,
        step: int,
        batch: RolloutBatch,
        scored: TokenStats,
        streams: TokenStreams,
        bounds: Bounds,
    ) -> dict[str, float]:
        """All updates of a training step, one after another.

        Args:
            step: counted from 1.
            scored: what the policy says of the batch before them.
            streams, bounds: what the loss reads.

        Returns:
            What is to be said of them, the same on every rank.

        Raises:
            RunStopped: more were left out than guard.max_skipped_updates.
        """
        policy, config = self.policy, self.policy.config
        sums = Sums((*policy.update_means, "grad_norm"), UPDATE_MAXIMA, device())
        every = config.diagnostics.signal
        signal = (
            signal_share(policy, batch, streams, bounds)
            if every and not (step - 1) % every
            else None
        )
        change = EntropyChange(policy, batch, scored) if config.diagnostics.entropy_change else None
        updates = mini_batches(
            batch.num_samples, config.train.mini_batches, config.train.epochs, config.seed, step
        )
        made, learning_rate = 0, 0.0
        for number, samples in enumerate(updates, start=1):
            updated = policy.update(batch, samples, streams, bounds, sums)
            self.alive()
            learning_rate = updated["learning_rate"]
            if updated["skipped"]:
                self.skipped.append(f"{name_of_step(step)}_update_{number}.pt")
                file = self._folder / self.skipped[-1]
                self.main(self._keep, file, batch, samples, streams, bounds)
                self._check_skipped()
            elif not updated["empty"]:
                made += 1
                sums.add("grad_norm", updated["grad_norm"], 1)
        return {
            **sums.reduce(),
            **(change.metrics() if change else {}),
            **({} if signal is None else {"signal_share": signal}),
            "learning_rate": learning_rate,
            "updates": made,
            "skipped_updates": len(self.skipped),
        }

    def _keep(
        self,
        file: Path,
        batch: RolloutBatch,
        samples: list[int],
        streams: TokenStreams,
        bounds: Bounds,
    ) -> None:
        save_mini_batch(file, batch, samples, streams, bounds)
        self.warn(
            f"loss or gradient is not finite: the update was left out; its mini-batch: {file}"
        )

    @property
    def _folder(self) -> Path:
        return self.policy.config.run_dir / "skipped"

    def _check_skipped(self) -> None:
        limit = self.policy.config.guard.max_skipped_updates
        if len(self.skipped) > limit:
            raise RunStopped(
                f"loss or gradient was not finite in {len(self.skipped)} updates "
                f"(guard.max_skipped_updates={limit}); lower optim.lr, or look at train.loss, "
                "if it is your own, and at their mini-batches: "
                + ", ".join(str(self._folder / name) for name in self.skipped)
            )


def save_mini_batch(
    file: Path, batch: RolloutBatch, samples: list[int], streams: TokenStreams, bounds: Bounds
) -> None:
    """Write what an update saw, for `torch.load(file)`; the file appears whole or not at all.

    A dictionary: `samples` (their numbers in the rollout), `tokens` (one int64 tensor a sample,
    prompt and response), `prompt_lengths_N`, `rewards_N`, `advantages_N`, `bounds` (Bounds' four
    numbers), and what the loss read of response tokens alone, one tensor a sample: `rollout_logp`,
    `old_logp`, `weights`, with a reference model `reference_logp`, and what the loss's `prepare`
    gave under its names in `prepared`.  With routing replay `routes` as well, as RolloutBatch's.
    """
    starts_N = batch.starts_N
    ends_N = starts_N + batch.prompt_lengths_N + batch.response_lengths_N
    of_samples = [streams.at(batch.response_slice(n)).map(torch.Tensor.clone) for n in samples]
    content = {
        "samples": samples,
        "tokens": [batch.tokens[starts_N[n] : ends_N[n]].clone() for n in samples],
        "prompt_lengths_N": batch.prompt_lengths_N[samples],
        "rewards_N": batch.rewards_N[samples],
        "advantages_N": batch.advantages_N[samples],
        "bounds": asdict(bounds),
        "prepared": {name: [one.prepared[name] for one in of_samples] for name in streams.prepared},
    }
    for name in ("rollout_logp", "old_logp", "weights", "reference_logp"):
        if getattr(streams, f"{name}_T") is not None:
            content[name] = [getattr(one, f"{name}_T") for one in of_samples]
    if batch.routes is not None:
        content["routes"] = [batch.routes[starts_N[n] : ends_N[n]].clone() for n in samples]
    file.parent.mkdir(exist_ok=True)
    with replacing(file) as part:
        torch.save(content, part)
