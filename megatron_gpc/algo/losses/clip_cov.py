"""Clip-Cov: a few of the tokens that would lower entropy most give no gradient (arXiv 2505.22617).

Entropy falls with the covariance of a token's log-prob and its advantage.  So of the tokens with a
high one some are drawn and left out (the paper's section 4.2).
"""

from __future__ import annotations

from dataclasses import replace
from random import Random

import torch

from megatron_gpc.algo.losses.clip import clip
from megatron_gpc.algo.losses.interface import LossInputs, LossOutputs
from megatron_gpc.config.types import FiniteFloat, NonNegativeFloat, section
from megatron_gpc.errors import UserError
from megatron_gpc.types import TokenStats, TokenStreams


@section
class ClipCov:
    """The default objective without the tokens that were drawn."""

    share: NonNegativeFloat = 2e-4
    """r: tokens that are drawn, as a share of all of the rollout's, if the band has so many."""
    low: FiniteFloat = 1.0
    """omega_low: tokens are drawn among those whose covariance is at least this,"""
    high: FiniteFloat = 5.0
    """omega_high: and at most this."""

    def __post_init__(self) -> None:
        if self.low > self.high:
            raise UserError(
                f"train.loss_arguments.low: {self.low:g} is above high={self.high:g}; lower it"
            )

    def prepare(
        self, streams: TokenStreams, scored: TokenStats, step: int, seed: int
    ) -> dict[str, torch.Tensor]:
        logp_T, advantages_T = scored.logp_T.double(), streams.advantages_T.double()
        covariance_T = (logp_T - logp_T.mean()) * (advantages_T - advantages_T.mean())
        band_T = (covariance_T >= self.low) & (covariance_T <= self.high)
        # Each token draws a number, whether it is in the band or not: so a token at the edge of it,
        # in at one layout and out at another by rounding, changes nobody else's.
        draw = torch.Generator().manual_seed(Random(f"{seed}/clip-cov/{step}").getrandbits(63))
        drawn_T = torch.rand(len(logp_T), generator=draw, dtype=torch.float64)
        count = min(int(self.share * len(logp_T)), int(band_T.sum()))
        left_out_T = torch.zeros_like(band_T)
        left_out_T[drawn_T.where(band_T, 2.0).argsort()[:count]] = True
        return {"left_out": left_out_T}

    def __call__(self, inputs: LossInputs) -> LossOutputs:
        left_out_T = inputs.streams.prepared["left_out"]
        kept = replace(inputs, advantages_T=inputs.advantages_T.masked_fill(left_out_T, 0.0))
        return replace(clip(kept), metrics={"left_out": left_out_T})
