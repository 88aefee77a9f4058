"""The losses as their papers write them, in float64, over whole sequences in one process."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from random import Random

import torch

# ID's first step: Hi(p) = 0.5 - p/4 above, Lo(p) = 0.3 - 0.13 p below
HI, LO = (-0.25, 0.5), (-0.13, 0.3)


@dataclass(frozen=True)
class Tokens:
    """Response tokens of a mini-batch, sample after sample; [T], float64."""

    logp_T: torch.Tensor
    """With gradient."""
    old_logp_T: torch.Tensor
    advantages_T: torch.Tensor
    lengths: list[int]
    """Of the samples' responses."""


@dataclass(frozen=True)
class Found:
    loss: torch.Tensor
    """What is descended: a mean over tokens or sequences, scalar."""
    ratio_T: torch.Tensor
    low_T: torch.Tensor
    """Where the lower bound acted."""
    high_T: torch.Tensor
    margin: float
    """How far the number nearest to a bound is from it, relatively."""


Objective = Callable[[Tokens], Found]


def clip(tokens: Tokens) -> Found:
    a_T = tokens.advantages_T
    r_T, p_T = (tokens.logp_T - tokens.old_logp_T).exp(), tokens.logp_T.detach().exp()
    low_T, high_T = 1 - (LO[0] * p_T + LO[1]), 1 + (HI[0] * p_T + HI[1])
    loss = -torch.minimum(r_T * a_T, r_T.clamp(low_T, high_T) * a_T).mean()
    r_T = r_T.detach()
    margin = float(torch.cat([r_T / low_T - 1, r_T / high_T - 1]).abs().min())
    return Found(loss, r_T, (r_T < low_T) & (a_T < 0), (r_T > high_T) & (a_T > 0), margin)


def gspo(eps_low: float, eps_high: float) -> Objective:
    """The gradient goes through the sequence's ratio itself."""

    def objective(tokens: Tokens) -> Found:
        low, high, terms, flags, margin = 1 - eps_low, 1 + eps_high, [], [], 1.0
        parts = (
            each.split(tokens.lengths)
            for each in (tokens.logp_T, tokens.old_logp_T, tokens.advantages_T)
        )
        for logp, old, a in zip(*parts, strict=True):
            s = (logp - old).mean().exp()
            terms.append(torch.minimum(s * a[0], s.clamp(low, high) * a[0]))
            r = s.item()
            flags += [(r, r < low and a[0] < 0, r > high and a[0] > 0)] * len(logp)
            margin = min(margin, abs(r / low - 1), abs(r / high - 1))
        ratio, below, above = zip(*flags, strict=True)
        return Found(
            -torch.stack(terms).mean(),
            torch.tensor(ratio, dtype=torch.float64),
            torch.tensor(below),
            torch.tensor(above),
            margin,
        )

    return objective


def cispo(eps_low: float, eps_high: float) -> Objective:
    def objective(tokens: Tokens) -> Found:
        r_T = (tokens.logp_T.detach() - tokens.old_logp_T).exp()
        low, high = 1 - eps_low, 1 + eps_high
        loss = -(r_T.clamp(low, high) * tokens.advantages_T * tokens.logp_T).mean()
        margin = float(torch.cat([r_T / low - 1, r_T / high - 1]).abs().min())
        return Found(loss, r_T, r_T < low, r_T > high, margin)

    return objective


def clip_cov(share: float, low: float, high: float) -> Objective:
    """Of a mini-batch that is the whole rollout, in the run's first step with seed 0."""

    def objective(tokens: Tokens) -> Found:
        logp_T, a_T = tokens.logp_T.detach(), tokens.advantages_T
        cov_T = (logp_T - logp_T.mean()) * (a_T - a_T.mean())
        draw = torch.Generator().manual_seed(Random("0/clip-cov/1").getrandbits(63))
        drawn = torch.rand(len(cov_T), generator=draw, dtype=torch.float64).tolist()
        band = [t for t, cov in enumerate(cov_T.tolist()) if low <= cov <= high]
        gone = sorted(band, key=lambda t: drawn[t])[: int(share * len(cov_T))]
        assert len(gone) > 5 and len(band) > len(gone)
        keep_T = torch.ones_like(a_T)
        keep_T[gone] = 0
        found = clip(Tokens(tokens.logp_T, tokens.old_logp_T, a_T * keep_T, tokens.lengths))
        margin = float(torch.cat([cov_T - low, cov_T - high]).abs().min())
        return Found(
            found.loss, found.ratio_T, found.low_T, found.high_T, min(found.margin, margin)
        )

    return objective
