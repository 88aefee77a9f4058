"""The samples of an earlier run in place of new ones (rollout.replay)."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from megatron_gpc.config import Config
from megatron_gpc.rollout.groups import Rollout, newest_version
from megatron_gpc.weights import replayed_experts


class Replay:
    """A sampler (rollout/sampler.py) that needs no engines, and is never given weights, as
    `takes_weights` says.

    Args:
        config: the run.
        run_dir: of the earlier run, which saved its samples.
    """

    takes_weights = False
    colocated = False

    def __init__(self, config: Config, run_dir: Path):
        self.config, self.run_dir = config, run_dir

    def begin(self, state: dict[str, Any]) -> None:
        """Nothing is remembered: a step's samples follow from its number."""

    def state(self) -> dict[str, Any]:
        return {}

    def start(self, step: int) -> None:
        """They are there already."""

    def collect(self, step: int) -> Rollout:
        """The samples that the earlier run trained this step on.

        Raises:
            UserError: it saved none of this step, in groups of another size, or without the routes
                that training needs.
        """
        from megatron_gpc.rollout import samples  # pyarrow: 0.3 s

        saved = samples.read_samples(self.run_dir, step)
        samples.check_groups(saved, self.config.rollout)
        experts = replayed_experts(self.config)
        samples.check_routes(saved, experts, self.run_dir)
        found = saved.samples if experts else [replace(s, routes=b"") for s in saved.samples]
        return Rollout(found, saved.positions, {"weight_version": newest_version(found)})

    def evaluate(self, step: int) -> dict[str, float]:
        """Nothing: that would need engines."""
        return {}
