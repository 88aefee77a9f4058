"""From samples to packed tensors, to mini-batches, to pipeline micro-batches.

Which samples share a mini-batch follows from (seed, step) alone, never from the parallel layout;
what a data-parallel rank or a micro-batch gets is a cut of it.  Losses are sums, so a cut changes
nothing.
"""

from __future__ import annotations

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


def padded_length(batch: RolloutBatch, multiple: int) -> int:
    """Common sequence length of a step's micro-batches: the longest sample, rounded up.

    One length a step: pipeline stages then know the shapes that they receive.
    """
    longest = int((batch.prompt_lengths_N + batch.response_lengths_N).max())
    return -(-longest // multiple) * multiple


def micro_batches(
    batch: RolloutBatch,
    samples: list[int],
    *,
    rank: int,
    ranks: int,
    size: int,
    length: int,
    multiple: int = 1,
) -> list[MicroBatch]:
    """One data-parallel rank's share of some samples, as micro-batches.

    Every rank gets the same number of micro-batches, of the same shape; the last ones may hold
    padding alone, with no response token.

    Args:
        batch: the step's rollout.
        samples: sample numbers, the same on all ranks.
        rank, ranks: this data-parallel rank and how many there are.
        size: sequences a micro-batch.
        length: padded sequence length.
        multiple: the number of micro-batches is rounded up to a multiple of this (the interleaved
            pipeline schedule wants the number of stages).
    """
    mine = samples[rank::ranks]
    count = -(-len(samples) // (ranks * size))
    count = -(-count // multiple) * multiple
    first_slot_N = batch.response_lengths_N.cumsum(0) - batch.response_lengths_N
    made = []
    for i in range(count):
        tokens_BS = torch.zeros(size, length, dtype=torch.int64)
        rows, targets, slots = [], [], []
        for b, n in enumerate(mine[i * size : (i + 1) * size]):
            start, prompt = int(batch.starts_N[n]), int(batch.prompt_lengths_N[n])
            response = int(batch.response_lengths_N[n])
            sequence = batch.tokens[start : start + prompt + response]
            tokens_BS[b, : len(sequence)] = sequence
            first_row = b * length + prompt - 1  # the position before a token predicts it
            rows.append(torch.arange(first_row, first_row + response))
            targets.append(sequence[prompt:])
            slots.append(torch.arange(int(first_slot_N[n]), int(first_slot_N[n]) + response))
        none = [torch.zeros(0, dtype=torch.int64)]
        made.append(
            MicroBatch(
                tokens_BS,
                torch.cat(rows or none),
                torch.cat(targets or none),
                torch.cat(slots or none),
            )
        )
    return made
