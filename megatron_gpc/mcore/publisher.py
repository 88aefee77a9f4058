"""The policy's weights at the sampler, whose engines may lose them; and what they do there."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import ParamSpec, Protocol, TypeVar

import torch

from megatron_gpc.batching import pack
from megatron_gpc.mcore.main_rank import MainRank
from megatron_gpc.mcore.offload import Offload
from megatron_gpc.mcore.policy import Policy
from megatron_gpc.mcore.setup import wait_for_all
from megatron_gpc.mcore.weights import Exporter
from megatron_gpc.metrics.step import Clock
from megatron_gpc.types import RolloutBatch, Sample
from megatron_gpc.weights import family_of
from megatron_gpc.weights.folders import read_hf_config

T = TypeVar("T")
P = ParamSpec("P")
HAND_OVERS = 3
"""How often weights are handed over before the run gives up on its engines."""


class TakesWeights(Protocol):
    """A sampler (rollout/sampler.py), as far as it concerns weights.  One that takes none
    (rollout/replay.py) is only asked to evaluate."""

    @property
    def takes_weights(self) -> bool: ...
    @property
    def colocated(self) -> bool: ...
    def take_weights(self, tensors: Iterator[tuple[str, torch.Tensor]], version: int) -> None: ...
    def probe(self) -> list[Sample]: ...
    def convinced(self, gaps: Sequence[Sequence[float]]) -> bool: ...
    def give_up(self, version: int) -> None: ...
    def rest(self) -> None: ...
    def evaluate(self, step: int) -> dict[str, float] | None: ...


class Publisher:
    """Hands the policy's weights to the sampler; every method is a collective.

    A version of the weights is the number of finished steps.  If engines share the policy's GPUs
    (rollout.server.colocated), the policy's training state is in CPU memory while they generate.

    Args:
        main: has the sampler.
        report: on the main rank, takes what an evaluation found after so many steps.
    """

    def __init__(
        self,
        main: MainRank,
        sampler: TakesWeights,
        policy: Policy,
        report: Callable[[int, dict[str, float]], None],
    ):
        self.main, self.sampler, self.policy, self.report = main, sampler, policy, report
        hf = read_hf_config(policy.config.model.hf)
        params = family_of(hf).params(hf, policy.config.parallel.tp)
        self.exporter = Exporter(policy.models, params)
        self.version: int | None = None
        self.wanted = main(lambda: sampler.takes_weights)
        self.offload = Offload(policy) if main(lambda: sampler.colocated) else None

    def sync(self, version: int, clock: Clock) -> None:
        """Give the sampler the policy's weights, unless it was given them already; evaluate them if
        that is due.

        Raises:
            ServerUnavailable: no engine has taken them.
        """
        if self.wanted and version != self.version:
            self._hand_over(version)
        clock.lap("seconds_sync")
        if found := self.ask(version, self.sampler.evaluate, version):
            self.main(self.report, version, found)
        clock.lap("seconds_evaluation")

    def ask(
        self, version: int, work: Callable[P, T | None], *arguments: P.args, **named: P.kwargs
    ) -> T:
        """What the main rank's `work` gives, on every rank.

        None means that no engine has the weights any more: they are handed over, as `version`, and
        `work` is done again.
        """
        while (found := self.main(work, *arguments, **named)) is None:
            self._hand_over(version)
        return found

    def take_turn(self) -> None:
        """The policy trains next: it takes back memory that colocated engines have had."""
        if self.offload is not None:
            self.main(self.sampler.rest)  # before any rank takes memory
            self.offload.to_device()

    def _hand_over(self, version: int) -> None:
        if self.offload is not None:
            self.offload.to_host()
            wait_for_all()  # before any engine takes memory
        for _ in range(HAND_OVERS):
            self.main.feed(
                lambda tensors: self.sampler.take_weights(tensors, version),
                self.exporter.tensors(),
            )
            if self._convinced():
                self.version = version
                return
        self.main(self.sampler.give_up, version)

    def _convinced(self) -> bool:
        """Whether an engine answers with the policy's own log-probs."""
        gaps: list[list[float]] = []
        if (probe := self.main(self._probe)) is not None:
            gap_T = (self.policy.score(probe).logp_T - probe.rollout_logp_T).abs()
            gaps = [gap_T[probe.response_slice(n)].tolist() for n in range(probe.num_samples)]
        return self.main(self.sampler.convinced, gaps)

    def _probe(self) -> RolloutBatch | None:
        """Of every engine that has the weights; None if none is asked, or none answers."""
        samples = self.sampler.probe()
        return pack(samples, torch.zeros(len(samples))) if samples else None
