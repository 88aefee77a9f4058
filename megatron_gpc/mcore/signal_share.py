"""How much of a step's gradient is signal: do two halves of its samples agree on it?

    signal_share    <g1, g2> / (|g1| |g2|)

g1 and g2 are the objective's gradients over two halves of the step's groups, of one policy, before
the step's updates.  They share what there is to learn, and their noise is independent: if signal
has the power S and the noise of a half the power N, the cosine is about S / (S + N).
"""

from __future__ import annotations

import math

from megatron_gpc.mcore.gradients import gradient, inner_product
from megatron_gpc.mcore.policy import Policy
from megatron_gpc.types import Bounds, RolloutBatch, TokenStreams


def signal_share(
    policy: Policy, batch: RolloutBatch, streams: TokenStreams, bounds: Bounds
) -> float:
    """The cosine, the same on every rank; a collective.

    Overwrites the policy's gradient buffers.

    Args:
        policy: before the step's updates.
        batch, streams, bounds: as of `Policy.update`.

    Returns:
        nan for fewer than two prompts, or a half whose gradient is 0 or not finite.
    """
    found = []
    for samples in halves(batch):
        if not batch.response_lengths_N[samples].any():  # the same on every rank
            return math.nan
        policy.gradient(batch, samples, streams, bounds)
        found.append(gradient(policy))
    one, other = found
    product, *squares = (
        inner_product(policy, *pair) for pair in ((one, other), (one, one), (other, other))
    )
    size = math.sqrt(squares[0] * squares[1])
    return product / size if size > 0 else math.nan


def halves(batch: RolloutBatch) -> tuple[list[int], list[int]]:
    """Sample numbers of every other prompt, and of the rest.

    All samples of a prompt are in the same half.  Groups whose advantages are all 0 are dealt out
    after the others, so that both halves have about as many that teach something.
    """
    groups: dict[tuple[int, ...], list[int]] = {}
    for n, (start, length) in enumerate(
        zip(batch.starts_N.tolist(), batch.prompt_lengths_N.tolist(), strict=True)
    ):
        prompt = tuple(batch.tokens[start : start + length].tolist())
        groups.setdefault(prompt, []).append(n)
    dealt = sorted(groups.values(), key=lambda group: not batch.advantages_N[group].any())
    one, other = (sorted(n for group in dealt[i::2] for n in group) for i in (0, 1))
    return one, other
