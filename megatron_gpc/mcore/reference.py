"""The reference model of the KL term: it stands in the policy's place while it scores."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch

from megatron_gpc.mcore.checkpoint.load import load_folder
from megatron_gpc.mcore.offload import host_copy
from megatron_gpc.mcore.policy import Policy
from megatron_gpc.types import RolloutBatch


class Reference:
    """Weights of another model of the policy's architecture, in CPU memory between uses.

    The network's weights and these change places, in place and one tensor after another: no second
    network is built, and the device needs room for one more tensor.  Optimizer and gradients are
    left alone, and the policy's weights come back to the bit.

    Args:
        policy: with its own weights in place.
        load: puts the reference's weights into the policy's network; every rank enters it.
    """

    def __init__(self, policy: Policy, load: Callable[[], None]):
        self.policy = policy
        self._away = [host_copy(parameter.detach()) for parameter in self._parameters()]
        load()
        self._change_places()

    def score(self, batch: RolloutBatch) -> torch.Tensor:
        """Its log-probs of a rollout's response tokens, as `Policy.score` gives them; tokens go to
        the experts that its own routers choose."""
        self._change_places()
        try:
            return self.policy.score(replace(batch, routes=None)).logp_T
        finally:
            self._change_places()

    @classmethod
    def configured(cls, policy: Policy) -> Reference | None:
        """That of kl.reference, by default model.hf; None with kl.coef=0."""
        config = policy.config
        if config.kl.coef <= 0:
            return None
        return cls(policy, lambda: load_folder(policy, config.kl.reference or config.model.hf))

    @torch.no_grad()
    def _change_places(self) -> None:
        for parameter, away in zip(self._parameters(), self._away, strict=True):
            here = parameter.detach().clone()
            parameter.copy_(away)
            away.copy_(here)

    def _parameters(self) -> list[torch.nn.Parameter]:
        return [p for model in self.policy.models for p in model.parameters()]
