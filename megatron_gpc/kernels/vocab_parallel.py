"""Log-prob of the sampled token and exact entropy, for logits sharded over tensor parallelism.

One autograd function, one collective.  Each rank folds its vocabulary shard of a token into six
numbers (kernels/merging.py).  An all_gather of these [T, 6] numbers is all that the ranks exchange,
in forward; backward needs nothing, since a logit's gradient depends on its own value and on the
merged sums.

fp32 logits exist for `chunk_tokens` tokens at a time, so what is needed beside the logits and their
gradient does not grow with T x V; on a CPU for fewer, since there the passes over them cost most,
and are 2 to 4 times as fast inside its cache.  Logits are never written to (a caller may still need
them) and saved by reference.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from megatron_gpc.kernels.merging import empty_part, merge_ranks
from megatron_gpc.types import TokenStats

IN_CACHE = 2**19
"""fp32 logits that exist at the same time on a CPU, unless those of one token are more: 2 MiB."""


def token_stats(
    logits_TV: torch.Tensor,
    targets_T: torch.Tensor,
    *,
    vocab_size: int,
    group: dist.ProcessGroup | None = None,
    temperature: float = 1.0,
    chunk_tokens: int = 1024,
    entropy_grad: bool = False,
) -> TokenStats:
    """Log-prob, entropy, sum p^2 and sum p^2 ln p of the distribution softmax(logits /
    temperature).

    Every rank of `group` must call this with the same targets_T, an empty one too.

    Args:
        logits_TV: this rank's shard, bf16 or fp32, finite; rank r holds tokens r*V to (r+1)*V.
        targets_T: sampled tokens, int64, 0 <= target < vocab_size.
        vocab_size: true size of the vocabulary; logits beyond it are padding and take no part: the
            entropy must not depend on how far tensor parallelism made the vocabulary pad.
        group: the tensor-parallel ranks; None if the vocabulary is not cut.
        temperature: divides the logits, here and nowhere else.
        chunk_tokens: most tokens whose fp32 logits exist at the same time.
        entropy_grad: whether entropy_T carries gradient; without, nothing is kept for it.

    Returns:
        TokenStats, fp32, the same on every rank of the group.  logp_T carries gradient; entropy_T
        does if asked for; sum_p2_T and sum_p2_logp_T never do.
    """
    if logits_TV.device.type == "cpu":
        chunk_tokens = min(chunk_tokens, max(1, IN_CACHE // logits_TV.shape[1]))
    return TokenStats(
        *_TokenStats.apply(
            logits_TV, targets_T, vocab_size, group, temperature, chunk_tokens, entropy_grad
        )
    )


class _TokenStats(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logits_TV: torch.Tensor,
        targets_T: torch.Tensor,
        vocab_size: int,
        group: dist.ProcessGroup | None,
        temperature: float,
        chunk_tokens: int,
        entropy_grad: bool,
    ) -> tuple[torch.Tensor, ...]:
        offset = 0 if group is None else group.rank() * logits_TV.shape[1]
        real = min(max(vocab_size - offset, 0), logits_TV.shape[1])  # columns that are no padding
        local_T = targets_T - offset
        own_T = (local_T >= 0) & (local_T < real)
        local_T = local_T.clamp(0, max(real - 1, 0))

        partial_T6 = empty_part(logits_TV)  # and stays so for a shard of padding alone
        for chunk in _chunks(len(targets_T), chunk_tokens if real else 0):
            x = logits_TV[chunk, :real].float() / temperature
            target = x.gather(1, local_T[chunk, None])[:, 0]
            m = x.amax(1)
            x -= m[:, None]
            e = x.exp()
            rows = [m, e.sum(1), (x * e).sum(1)]
            e *= e
            rows += [e.sum(1), x.mul_(e).sum(1), target.where(own_T[chunk], 0.0)]
            partial_T6[chunk] = torch.stack(rows, 1)

        merged = merge_ranks(partial_T6, group)
        ctx.save_for_backward(
            *(logits_TV, local_T, own_T, merged.max_T, merged.log_s_T),
            merged.entropy_T if entropy_grad else None,
        )
        ctx.real, ctx.temperature, ctx.chunk_tokens = real, temperature, chunk_tokens
        stats = merged[:4]
        ctx.mark_non_differentiable(*stats[2:], *([] if entropy_grad else [stats[1]]))
        return stats

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """d logp/dx_v = [v is target] - p_v;  d H/dx_v = -p_v (ln p_v + H); both / temperature."""
        logits_TV, local_T, own_T, max_T, log_s_T, entropy_T = ctx.saved_tensors
        grad_logp_T, grad_entropy_T = grads[:2]
        grad_TV = torch.empty_like(logits_TV)
        grad_TV[:, ctx.real :] = 0
        for chunk in _chunks(len(local_T), ctx.chunk_tokens if ctx.real else 0):
            logp = logits_TV[chunk, : ctx.real].float() / ctx.temperature
            logp -= max_T[chunk, None]
            logp -= log_s_T[chunk, None]
            g = logp.exp()
            if entropy_T is None:
                g *= -grad_logp_T[chunk, None]
            else:
                logp += entropy_T[chunk, None]
                logp *= grad_entropy_T[chunk, None]
                logp += grad_logp_T[chunk, None]
                g *= logp.neg_()
            g.scatter_add_(
                1, local_T[chunk, None], grad_logp_T[chunk].where(own_T[chunk], 0.0)[:, None]
            )
            grad_TV[chunk, : ctx.real] = g.div_(ctx.temperature)
        return grad_TV, None, None, None, None, None, None


def _chunks(tokens: int, size: int) -> list[slice]:
    """Slices of at most `size` tokens; no slices if size is 0."""
    return [slice(i, min(i + size, tokens)) for i in range(0, tokens if size else 0, size or 1)]
