"""Importance weights for samples of another policy than the one whose log-probs are `old`.

The server computes in another precision and batch than the trainer, and overlapped or resumed
samples are of older weights.  With mu the distribution that a token was drawn from and q the
trainer's old policy, E_q[f] = E_mu[(q / mu) f]: each token's term of the objective is multiplied by
w = q / mu, bounded because its variance is not.
"""

from __future__ import annotations

import torch

from megatron_gpc.config import TrainConfig
from megatron_gpc.types import RolloutBatch


def correction_weights(
    batch: RolloutBatch, old_logp_T: torch.Tensor, train: TrainConfig
) -> torch.Tensor:
    """w for every response token of a rollout, fp32 [T]; no gradient flows through it.

    Args:
        old_logp_T: the trainer's old log-probs (q), [T] fp32.
        train: says what becomes of w (train.correction, correction_level, correction_cap).
    """
    if train.correction == "none":
        return torch.ones_like(old_logp_T)
    rollout_logp_T, lengths_N = batch.rollout_logp_T, batch.response_lengths_N
    # equal log-probs have the ratio 1, -inf included
    log_w_T = (old_logp_T - rollout_logp_T).where(old_logp_T != rollout_logp_T, 0.0).detach()
    if train.correction_level == "sequence":
        sample_T = torch.arange(len(lengths_N)).repeat_interleave(lengths_N)
        # float64: a long response adds up thousands of rounded terms
        sums_N = torch.zeros(len(lengths_N), dtype=torch.float64)
        # inf (mu = 0) would make a NaN of -inf (q = 0), whose product is 0
        finite_above_T = log_w_T.double().clamp(max=torch.finfo(torch.float32).max)
        log_w_T = sums_N.index_add_(0, sample_T, finite_above_T)[sample_T].float()
    w_T, cap = log_w_T.exp(), train.correction_cap
    if train.correction == "truncate":
        return w_T.clamp(max=cap)
    return torch.where((w_T >= 1 / cap) & (w_T <= cap), w_T, torch.zeros_like(w_T))
