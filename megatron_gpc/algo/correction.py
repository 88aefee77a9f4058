"""Importance weights for samples of another policy than the one whose log-probs are `old`.

The server computes in another precision and batch than the trainer, and overlapped or resumed
samples are of older weights.  With mu the distribution that a token was drawn from and q the
trainer's old policy, E_q[f] = E_mu[(q / mu) f]: each token's term of the objective is multiplied by
w = q / mu, bounded because its variance is not.
"""

from __future__ import annotations

from typing import Literal

import torch

from megatron_gpc.config import TrainConfig
from megatron_gpc.types import RolloutBatch


def correction_weights(
    old_logp_T: torch.Tensor,
    rollout_logp_T: torch.Tensor,
    response_lengths_N: torch.Tensor,
    kind: Literal["none", "truncate", "mask"],
    level: Literal["token", "sequence"],
    cap: float,
) -> torch.Tensor:
    """w for every response token, fp32 [T]; no gradient flows through it.

    Args:
        old_logp_T: the trainer's old log-probs (q), [T] fp32.
        rollout_logp_T: log-probs that the tokens were drawn with (mu), [T] fp32.
        response_lengths_N: tokens of each response, summing to T.
        kind: `truncate`: min(w, cap); `mask`: w inside [1 / cap, cap], 0 outside; `none`: 1.
        level: the ratio of each token, or of the whole response, the same for all its tokens.
        cap: above 1.
    """
    if kind == "none":
        return torch.ones_like(old_logp_T)
    # equal log-probs have the ratio 1, -inf included
    log_w_T = (old_logp_T - rollout_logp_T).where(old_logp_T != rollout_logp_T, 0.0).detach()
    if level == "sequence":
        sample_T = torch.arange(len(response_lengths_N)).repeat_interleave(response_lengths_N)
        # float64: a long response adds up thousands of rounded terms
        sums_N = torch.zeros(len(response_lengths_N), dtype=torch.float64)
        # inf (mu = 0) would make a NaN of -inf (q = 0), whose product is 0
        finite_above_T = log_w_T.double().clamp(max=torch.finfo(torch.float32).max)
        log_w_T = sums_N.index_add_(0, sample_T, finite_above_T)[sample_T].float()
    w_T = log_w_T.exp()
    if kind == "truncate":
        return w_T.clamp(max=cap)
    return torch.where((w_T >= 1 / cap) & (w_T <= cap), w_T, torch.zeros_like(w_T))


def batch_correction(
    batch: RolloutBatch, old_logp_T: torch.Tensor, train: TrainConfig
) -> torch.Tensor:
    """The configured weights of a rollout's response tokens (train.correction*), fp32 [T]."""
    return correction_weights(
        old_logp_T,
        batch.rollout_logp_T,
        batch.response_lengths_N,
        train.correction,
        train.correction_level,
        train.correction_cap,
    )
