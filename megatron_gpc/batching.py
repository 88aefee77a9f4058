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
from random import Random

import torch

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
        routes=_routes(samples) if samples and all(s.routes for s in samples) else None,
    )


def _routes(samples: list[Sample]) -> torch.Tensor:
    """RolloutBatch.routes of samples that all say where their tokens went."""
    parts = []
    for sample in samples:
        known = len(sample.prompt.token_ids) + len(sample.token_ids) - 1
        part = torch.frombuffer(bytearray(sample.routes), dtype=torch.int16).view(known, -1)
        parts += [part, part.new_full((1, part.shape[1]), -1)]
    return torch.cat(parts)


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
    tokens: torch.Tensor, sizes_B: torch.Tensor, multiple_of: tuple[int, int]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sequences with the padding they need: tokens_S, and how long each now is.

    Args:
        tokens: the sequences, one after another.
        sizes_B: how long each is; without any there is one, of padding only.
        multiple_of: as of `multiples`.
    """
    each, total = multiple_of
    if not len(sizes_B):
        sizes_B = torch.zeros(1, dtype=torch.int64)
    lengths_B = (sizes_B.clamp(min=1) + each - 1) // each * each
    lengths_B[-1] += -int(lengths_B.sum()) % total
    tokens_S = torch.zeros(int(lengths_B.sum()), dtype=torch.int64)
    tokens_S[ranges(lengths_B.cumsum(0) - lengths_B, sizes_B)] = tokens
    return tokens_S, lengths_B


def ranges(begins: torch.Tensor, sizes: torch.Tensor) -> torch.Tensor:
    """As many numbers from each of `begins` on as `sizes` says, all one after another.

    >>> ranges(torch.tensor([3, 10]), torch.tensor([2, 3]))
    tensor([ 3,  4, 10, 11, 12])
    """
    shifts = begins - (sizes.cumsum(0) - sizes)
    return torch.arange(int(sizes.sum())) + shifts.repeat_interleave(sizes)


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
    return ranges(begins, sizes.repeat_interleave(2))


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
        routes=None if micro.routes is None else micro.routes[held],
    )


def _micro_batch(
    batch: RolloutBatch, samples: list[int], multiple_of: tuple[int, int]
) -> MicroBatch:
    chosen_B = torch.tensor(samples, dtype=torch.int64)
    starts_B, prompts_B = batch.starts_N[chosen_B], batch.prompt_lengths_N[chosen_B]
    responses_B = batch.response_lengths_N[chosen_B]
    first_slots_B = (batch.response_lengths_N.cumsum(0) - batch.response_lengths_N)[chosen_B]
    sizes_B = prompts_B + responses_B
    tokens_S, lengths_B = join(batch.tokens[ranges(starts_B, sizes_B)], sizes_B, multiple_of)
    begins_B = (lengths_B.cumsum(0) - lengths_B)[: len(samples)]
    routes = None
    if batch.routes is not None:
        routes = batch.routes.new_full((len(tokens_S), batch.routes.shape[1]), -1)
        routes[ranges(begins_B, sizes_B)] = batch.routes[ranges(starts_B, sizes_B)]
    return MicroBatch(
        tokens_S,
        tuple(lengths_B.tolist()),
        padding=len(tokens_S) - int(sizes_B.sum()),
        rows_T=ranges(begins_B + prompts_B - 1, responses_B),  # the position before predicts
        targets_T=batch.tokens[ranges(starts_B + prompts_B, responses_B)],
        slots_T=ranges(first_slots_B, responses_B),
        routes=routes,
    )
