"""What a token's statistics and their gradients are held to: one process, float64, autograd."""

from __future__ import annotations

import torch


def float64_stats(
    x_TV: torch.Tensor,
    targets_T: torch.Tensor,
    weights_2T: torch.Tensor,
    temperature: float,
    entropy_grad: bool,
) -> torch.Tensor:
    """ln p of the target, entropy, sum p^2 and sum p^2 ln p, [4, T].

    Gradients of what x_TV, float64 logits of the whole vocabulary, depends on are left in place:
    those of log-probs and, with entropy_grad, entropies, each times its weight.
    """
    logp_TV = (x_TV / temperature).log_softmax(-1)
    p_TV = logp_TV.exp()
    values = torch.stack(
        [
            logp_TV.gather(1, targets_T[:, None])[:, 0],
            -(p_TV * logp_TV).sum(-1),
            (p_TV**2).sum(-1),
            (p_TV**2 * logp_TV).sum(-1),
        ]
    )
    loss = (values[0] * weights_2T[0]).sum()
    if entropy_grad:
        loss = loss + (values[1] * weights_2T[1]).sum()
    loss.backward()
    return values.detach()
