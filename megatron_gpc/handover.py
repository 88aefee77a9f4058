"""Weights to the engines and samples back, as collectives that every rank enters."""

from __future__ import annotations

from megatron_gpc.config import Config
from megatron_gpc.mcore.offload import Offload
from megatron_gpc.mcore.policy import Policy
from megatron_gpc.mcore.setup import from_main, wait_for_all
from megatron_gpc.mcore.weights import Exporter
from megatron_gpc.metrics.step import Clock
from megatron_gpc.rank0 import Rank0
from megatron_gpc.types import RolloutBatch

HAND_OVERS = 3
"""How often weights are handed over before the run gives up on its engines."""


class Handover:
    """What stands between the policy and the engines; the same calls on every rank."""

    def __init__(self, config: Config, rank0: Rank0, exporter: Exporter, policy: Policy):
        self.config, self.rank0, self.exporter, self.policy = config, rank0, exporter, policy
        self.version: int | None = None
        self.offload = Offload(policy) if rank0.colocated else None

    def refresh(self, version: int, clock: Clock) -> None:
        """Give the engines these weights unless they have them; evaluate if that is due."""
        if version != self.version:
            self._hand_over(version)
        clock.lap("seconds_sync")
        while not from_main(self.rank0.evaluate_if_due(version)):
            self._hand_over(version)
        clock.lap("seconds_evaluation")

    def rollout(self, step: int) -> tuple[RolloutBatch, dict[str, float]]:
        """A training step's samples; hands weights over again if no engine has them any more."""
        while (found := from_main(self.rank0.rollout(step))) is None:
            self._hand_over(step - 1)
        if self.offload is not None:
            from_main(self.rank0.rest_engines())  # before any rank takes memory
            self.offload.to_device()
        return found

    def _hand_over(self, version: int) -> None:
        if self.offload is not None:
            self.offload.to_host()
            wait_for_all()  # before any engine takes memory
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
