"""The samples of an earlier run in place of new ones (rollout.replay)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megatron_gpc.config import Config
from megatron_gpc.rollout.groups import Rollout, newest_version


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
            UserError: it saved none of this step, or in groups of another size.
        """
        from megatron_gpc.rollout.samples import check_groups, read_samples  # pyarrow: 0.3 s

        saved = read_samples(self.run_dir, step)
        check_groups(saved, self.config.rollout)
        newest = newest_version(saved.samples)
        return Rollout(saved.samples, saved.positions, {"weight_version": newest})

    def evaluate(self, step: int) -> dict[str, float]:
        """Nothing: that would need engines."""
        return {}
