"""From samples to packed tensors, to mini-batches, to pipeline micro-batches.

Which samples share a mini-batch follows from (seed, step) alone, never from the parallel layout;
what a data-parallel rank or a micro-batch gets is a cut of it, decided by lengths alone.  Losses
are sums, so a cut changes nothing.
"""

from __future__ import annotations

import heapq
from random import Random

import torch

from megatron_gpc.types import MicroBatch, RolloutBatch, Sample


def pack(samples: list[Sample], advantages_N: torch.Tensor) -> RolloutBatch:
    """Samples, ordered prompt by prompt, as one packed batch."""
    prompt_lengths_N = torch.tensor([len(s.prompt.token_ids) for s in samples])
    response_lengths_N = torch.tensor([len(s.token_ids) for s in samples])
    ends_N = (prompt_lengths_N + response_lengths_N).cumsum(0)
    return RolloutBatch(
        tokens=torch.tensor([t for s in samples for t in (*s.prompt.token_ids, *s.token_ids)]),
        starts_N=ends_N - prompt_lengths_N - response_lengths_N,
        prompt_lengths_N=prompt_lengths_N,
        response_lengths_N=response_lengths_N,
        rollout_logp_T=torch.tensor([p for s in samples for p in s.logprobs], dtype=torch.float32),
        rewards_N=torch.tensor([s.reward for s in samples], dtype=torch.float32),
        advantages_N=advantages_N,
    )


def mini_batches(
    num_samples: int, count: int, epochs: int, seed: int, step: int
) -> list[list[int]]:
    """Sample numbers of every update of a training step: `count` for each of `epochs` passes.

    Every pass visits every sample once, in an order of its own; sizes differ by at most one.
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
    multiple: int = 1,
    count_multiple: int = 1,
) -> list[MicroBatch]:
    """One data-parallel rank's share of some samples, as micro-batches.

    Every rank gets the same number of micro-batches; some may hold padding alone, with no response
    token.

    Args:
        batch: the step's rollout.
        samples: sample numbers, the same on all ranks.
        rank, ranks: this data-parallel rank and how many there are.
        size: most sequences of a micro-batch.
        budget: most tokens of a micro-batch; a longer sequence gets one of its own.
        multiple: the number of positions is rounded up to a multiple of this (sequence parallelism
            wants tp).
        count_multiple: the same for the number of micro-batches (the interleaved pipeline schedule
            wants the number of stages).
    """
    lengths_N = batch.prompt_lengths_N + batch.response_lengths_N
    lengths = lengths_N[samples].tolist()
    shares = balance(lengths, ranks, size, budget, count_multiple)
    return [_micro_batch(batch, [samples[i] for i in share], multiple) for share in shares[rank]]


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
    """`count` shares; None where they are too few."""
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


def join(sequences: list[torch.Tensor], multiple: int) -> tuple[torch.Tensor, tuple[int, ...]]:
    """(tokens_S, lengths_B) of a MicroBatch of these sequences; of padding where there are none."""
    lengths = [len(sequence) for sequence in sequences] or [0]
    total = sum(lengths)
    padding = -total % multiple if total else multiple
    lengths[-1] += padding
    return torch.cat([*sequences, torch.zeros(padding, dtype=torch.int64)]), tuple(lengths)


def _micro_batch(batch: RolloutBatch, samples: list[int], multiple: int) -> MicroBatch:
    sequences, rows, targets, slots = [], [], [], []
    position = 0
    for n in samples:
        start, prompt = int(batch.starts_N[n]), int(batch.prompt_lengths_N[n])
        response = batch.response_slice(n)
        sequence = batch.tokens[start : start + prompt + response.stop - response.start]
        sequences.append(sequence)
        targets.append(sequence[prompt:])
        slots.append(torch.arange(response.start, response.stop))
        # the position before a token predicts it
        rows.append(torch.arange(position + prompt - 1, position + len(sequence) - 1))
        position += len(sequence)
    tokens_S, lengths_B = join(sequences, multiple)
    none = torch.zeros(0, dtype=torch.int64)
    return MicroBatch(
        tokens_S,
        lengths_B,
        padding=len(tokens_S) - position,
        rows_T=torch.cat([none, *rows]),
        targets_T=torch.cat([none, *targets]),
        slots_T=torch.cat([none, *slots]),
    )
