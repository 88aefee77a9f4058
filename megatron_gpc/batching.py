"""From samples to packed tensors, to mini-batches, to pipeline micro-batches.

Which samples share a mini-batch follows from (seed, step) alone, never from the parallel layout;
what a data-parallel rank or a micro-batch gets is a cut of it, decided by lengths alone.  Losses
are sums, so a cut changes nothing.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate
from random import Random

import torch
from torch.nn.functional import pad

from megatron_gpc.config import ParallelConfig
from megatron_gpc.types import MicroBatch, RolloutBatch, Sample, TokenStreams


def pack(samples: list[Sample], advantages_N: torch.Tensor) -> RolloutBatch:
    """Samples, ordered prompt by prompt, as one packed batch; there may be none."""
    prompt_lengths_N = torch.tensor([len(s.prompt.token_ids) for s in samples], dtype=torch.int64)
    response_lengths_N = torch.tensor([len(s.token_ids) for s in samples], dtype=torch.int64)
    ends_N = (prompt_lengths_N + response_lengths_N).cumsum(0)
    return RolloutBatch(
        tokens=torch.tensor(
            [t for s in samples for t in (*s.prompt.token_ids, *s.token_ids)], dtype=torch.int64
        ),
        starts_N=ends_N - prompt_lengths_N - response_lengths_N,
        prompt_lengths_N=prompt_lengths_N,
        response_lengths_N=response_lengths_N,
        rollout_logp_T=torch.tensor([p for s in samples for p in s.logprobs], dtype=torch.float32),
        rewards_N=torch.tensor([s.reward for s in samples], dtype=torch.float32),
        advantages_N=advantages_N,
    )


def token_streams(
    batch: RolloutBatch,
    old_logp_T: torch.Tensor,
    weights_T: torch.Tensor,
    reference_logp_T: torch.Tensor | None = None,
) -> TokenStreams:
    """What the loss reads of the batch's response tokens; the arguments are fields of it."""
    lengths_N = batch.response_lengths_N
    return TokenStreams(
        old_logp_T=old_logp_T,
        rollout_logp_T=batch.rollout_logp_T,
        advantages_T=batch.advantages_N.repeat_interleave(lengths_N),
        weights_T=weights_T,
        sample_T=torch.arange(batch.num_samples).repeat_interleave(lengths_N),
        lengths_T=lengths_N.repeat_interleave(lengths_N),
        num_samples=batch.num_samples,
        reference_logp_T=reference_logp_T,
    )


def mini_batches(
    num_samples: int, count: int, epochs: int, seed: int, step: int
) -> list[list[int]]:
    """Sample numbers of every update of a training step: `count` for each of `epochs` passes.

    Every pass visits every sample once, in an order of its own; sizes differ by at most one, so
    that with fewer samples than `count` some are empty.
    """
    batches = []
    for epoch in range(epochs):
        order = list(range(num_samples))
        Random(f"{seed}/minibatches/{step}/{epoch}").shuffle(order)
        edges = [num_samples * i // count for i in range(count + 1)]
        batches += [order[a:b] for a, b in zip(edges, edges[1:], strict=False)]
    return batches


def micro_batches(
    batch: RolloutBatch,
    samples: list[int],
    *,
    rank: int,
    ranks: int,
    size: int,
    budget: int | None = None,
    multiple_of: tuple[int, int] = (1, 1),
    count_multiple: int = 1,
) -> list[MicroBatch]:
    """One data-parallel rank's share of some samples, as micro-batches.

    Every rank gets the same number of micro-batches; some may hold padding alone, with no response
    token.  With context parallelism `context_part` cuts them further.

    Args:
        batch: the step's rollout.
        samples: sample numbers, the same on all ranks.
        rank, ranks: this data-parallel rank and how many there are.
        size: most sequences of a micro-batch.
        budget: most tokens of a micro-batch; a longer sequence gets one of its own.
        multiple_of: what sequences, and micro-batches, are padded to; see `multiples`.
        count_multiple: the number of micro-batches is a multiple of this (the interleaved pipeline
            schedule wants the number of stages).
    """
    lengths_N = batch.prompt_lengths_N + batch.response_lengths_N
    lengths = lengths_N[samples].tolist()
    shares = balance(lengths, ranks, size, budget, count_multiple)
    return [_micro_batch(batch, [samples[i] for i in share], multiple_of) for share in shares[rank]]


def balance(
    lengths: list[int], ranks: int, size: int, budget: int | None = None, count_multiple: int = 1
) -> list[list[list[int]]]:
    """[rank][micro-batch] -> indices into `lengths`: as few micro-batches as the limits allow, all
    of nearly the same number of tokens.  Arguments as of `micro_batches`.

    Sequences go, longest first, to the micro-batch that has the fewest tokens (R. L. Graham, 1969).
    Micro-batches go to the ranks in turn, the fullest first, there and back: what ranks run at the
    same time is alike, and so are their sums.
    """
    limit = budget or sum(lengths) + 1
    needed = max(-(-len(lengths) // size), -(-sum(min(n, limit) for n in lengths) // limit))
    count = -(-needed // (ranks * count_multiple)) * count_multiple
    while (found := _fill(lengths, count * ranks, size, limit)) is None:
        count += count_multiple
    found.sort(key=lambda share: -sum(lengths[i] for i in share))
    rows = [found[i * ranks : (i + 1) * ranks][:: -1 if i % 2 else 1] for i in range(count)]
    return [[row[rank] for row in rows] for rank in range(ranks)]


def _fill(lengths: list[int], count: int, size: int, limit: int) -> list[list[int]] | None:
    """`count` shares; None if that is too few for the limits."""
    shares: list[list[int]] = [[] for _ in range(count)]
    open_shares = [(0, share) for share in range(count)]  # a heap: fewest tokens first
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if not open_shares:
            return None
        tokens, share = open_shares[0]
        if tokens and tokens + lengths[i] > limit:
            return None
        shares[share].append(i)
        if len(shares[share]) == size:
            heapq.heappop(open_shares)
        else:
            heapq.heapreplace(open_shares, (tokens + lengths[i], share))
    return shares


def multiples(p: ParallelConfig) -> tuple[int, int]:
    """Of what the positions of a sequence, and those of a micro-batch, have to be multiples.

    Context parallelism cuts sequences into 2 * cp chunks, and sequence parallelism what a
    context-parallel rank holds into tp parts.
    """
    chunks = 2 * p.cp if p.cp > 1 else 1
    return chunks, math.lcm(chunks, p.cp * (p.tp if p.sequence_parallel else 1))


def join(
    sequences: list[torch.Tensor], multiple_of: tuple[int, int]
) -> tuple[torch.Tensor, tuple[int, ...]]:
    """(tokens_S, lengths_B) of a MicroBatch of these sequences; only padding if there are none.

    Args:
        sequences: tokens, without padding.
        multiple_of: as of `multiples`.
    """
    each, total = multiple_of
    sequences = sequences or [torch.zeros(0, dtype=torch.int64)]
    lengths = [-(-max(1, len(sequence)) // each) * each for sequence in sequences]
    lengths[-1] += -sum(lengths) % total
    padded = [
        pad(sequence, (0, length - len(sequence)))
        for sequence, length in zip(sequences, lengths, strict=True)
    ]
    return torch.cat(padded), tuple(lengths)


def chunk_positions(lengths_B: Sequence[int], rank: int, ranks: int) -> torch.Tensor:
    """Positions that one context-parallel rank holds, in its order: of the 2 * ranks equal chunks
    of every sequence those numbered `rank` and 2 * ranks - 1 - rank.

    Causal attention costs a chunk the more the later it stands; so paired, all ranks pay the same.
    transformer-engine and megatron-core's rotary embedding rely on this order.
    """
    lengths = torch.tensor(lengths_B)
    sizes = lengths // (2 * ranks)
    chunks = torch.tensor([rank, 2 * ranks - 1 - rank])
    begins = ((lengths.cumsum(0) - lengths)[:, None] + sizes[:, None] * chunks).flatten()
    sizes = sizes.repeat_interleave(2)
    shifts = begins - (sizes.cumsum(0) - sizes)  # of the chunks, from where they stand here
    return torch.arange(int(sizes.sum())) + shifts.repeat_interleave(sizes)


def context_part(micro: MicroBatch, rank: int, ranks: int) -> MicroBatch:
    """What one context-parallel rank computes of a micro-batch: its positions, and the response
    tokens that are predicted from them."""
    if ranks == 1:
        return micro
    held = chunk_positions(micro.lengths_B, rank, ranks)
    row_of_S = torch.full_like(micro.tokens_S, -1)
    row_of_S[held] = torch.arange(len(held))
    rows_T = row_of_S[micro.rows_T]
    mine_T = rows_T >= 0
    return replace(
        micro,
        tokens_S=micro.tokens_S[held],
        rows_T=rows_T[mine_T],
        targets_T=micro.targets_T[mine_T],
        slots_T=micro.slots_T[mine_T],
    )


def _micro_batch(
    batch: RolloutBatch, samples: list[int], multiple_of: tuple[int, int]
) -> MicroBatch:
    ends_N = batch.starts_N + batch.prompt_lengths_N + batch.response_lengths_N
    sequences = [batch.tokens[batch.starts_N[n] : ends_N[n]] for n in samples]
    tokens_S, lengths_B = join(sequences, multiple_of)
    none = torch.zeros(0, dtype=torch.int64)
    rows, targets, slots = [none], [none], [none]
    for n, sequence, begin in zip(
        samples, sequences, accumulate(lengths_B, initial=0), strict=False
    ):
        prompt, response = int(batch.prompt_lengths_N[n]), batch.response_slice(n)
        # the position before a token predicts it
        rows.append(torch.arange(begin + prompt - 1, begin + len(sequence) - 1))
        targets.append(sequence[prompt:])
        slots.append(torch.arange(response.start, response.stop))
    return MicroBatch(
        tokens_S,
        lengths_B,
        padding=len(tokens_S) - sum(map(len, sequences)),
        rows_T=torch.cat(rows),
        targets_T=torch.cat(targets),
        slots_T=torch.cat(slots),
    )
