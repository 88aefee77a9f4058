"""Packing, mini-batches and micro-batches lose and repeat nothing."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import random_batch

from megatron_gpc.batching import (
    balance,
    chunk_positions,
    context_part,
    micro_batches,
    mini_batches,
    multiples,
)
from megatron_gpc.config import ParallelConfig


@given(st.integers(1, 60), st.integers(1, 8), st.integers(1, 3), st.integers(0, 99))
def test_every_epoch_visits_every_sample_once(samples, count, epochs, seed):
    count = min(count, samples)
    batches = mini_batches(samples, count, epochs, seed, step=3)
    assert len(batches) == count * epochs
    for epoch in range(epochs):
        part = batches[epoch * count : (epoch + 1) * count]
        assert sorted(n for batch in part for n in batch) == list(range(samples))
        assert max(map(len, part)) - min(map(len, part)) <= 1
    assert batches == mini_batches(samples, count, epochs, seed, step=3)


@settings(max_examples=60)
@given(
    st.integers(1, 5),
    st.integers(1, 5),
    st.none() | st.integers(1, 40),
    st.integers(1, 3),
    st.integers(1, 3),
    st.integers(1, 3),
    st.integers(1, 16),
)
def test_micro_batches_of_all_ranks_hold_every_token_once(
    ranks, size, budget, cp, tp, count_multiple, chosen
):
    batch = random_batch()
    samples = list(range(chosen))
    each, total = multiples(ParallelConfig(cp=cp, tp=tp, sequence_parallel=True))
    made = [
        micro_batches(
            batch,
            samples,
            rank=rank,
            ranks=ranks,
            size=size,
            budget=budget,
            multiple_of=(each, total),
            count_multiple=count_multiple,
        )
        for rank in range(ranks)
    ]
    counts = {len(one) for one in made}
    assert len(counts) == 1 and counts.pop() % count_multiple == 0
    slots, targets, real = [], [], 0
    for micro in (m for one in made for m in one):
        assert sum(micro.lengths_B) == len(micro.tokens_S) > 0
        assert not any(length % each for length in micro.lengths_B)
        assert sum(micro.lengths_B) % (cp * tp) == 0
        real += len(micro.tokens_S) - micro.padding
        # each row's next token is the target that it predicts
        assert torch.equal(micro.tokens_S[micro.rows_T + 1], micro.targets_T)
        for rank in range(cp):
            part = context_part(micro, rank, cp)
            assert len(part.tokens_S) == len(micro.tokens_S) // cp
            if cp > 1:
                held = chunk_positions(micro.lengths_B, rank, cp)
                assert torch.equal(micro.tokens_S[held[part.rows_T] + 1], part.targets_T)
            slots += part.slots_T.tolist()
            targets += part.targets_T.tolist()
    tokens = int(batch.response_lengths_N[:chosen].sum())
    assert real == tokens + int(batch.prompt_lengths_N[:chosen].sum())
    assert sorted(slots) == list(range(tokens))
    responses = torch.cat(
        [
            batch.tokens[s + p : s + p + r]
            for s, p, r in zip(
                batch.starts_N.tolist(),
                batch.prompt_lengths_N.tolist(),
                batch.response_lengths_N.tolist(),
                strict=True,
            )
        ]
    )
    assert torch.tensor(targets)[torch.tensor(slots).argsort()].tolist() == (
        responses[:tokens].tolist()
    )


def test_context_parallel_ranks_hold_an_early_and_a_late_chunk_of_every_sequence():
    assert chunk_positions((8, 4), 0, 2).tolist() == [0, 1, 6, 7, 8, 11]
    assert chunk_positions((8, 4), 1, 2).tolist() == [2, 3, 4, 5, 9, 10]


LENGTHS = st.lists(st.integers(1, 1000), min_size=1, max_size=60)


@given(LENGTHS, st.integers(1, 5), st.integers(1, 9), st.none() | st.integers(1, 3000))
def test_micro_batches_keep_to_their_limits(lengths, ranks, size, budget):
    shares = [share for one in balance(lengths, ranks, size, budget) for share in one]
    assert sorted(i for share in shares for i in share) == list(range(len(lengths)))
    for share in shares:
        assert len(share) <= size
        assert budget is None or len(share) < 2 or sum(lengths[i] for i in share) <= budget


@given(LENGTHS, st.integers(1, 5), st.integers(1, 9))
def test_micro_batch_size_alone_decides_how_many_there_are(lengths, ranks, size):
    shares = balance(lengths, ranks, size)
    assert {len(one) for one in shares} == {-(-len(lengths) // (ranks * size))}


@given(LENGTHS, st.integers(1, 5), st.integers(1, 4))
def test_ranks_and_their_micro_batches_differ_by_one_sequence_at_most(lengths, ranks, multiple):
    shares = balance(lengths, ranks, size=len(lengths), count_multiple=multiple)
    tokens = [[sum(lengths[i] for i in share) for share in one] for one in shares]
    for sums in ([sum(one) for one in tokens], [n for one in tokens for n in one]):
        assert max(sums) - min(sums) <= max(lengths)


def test_a_token_budget_packs_short_sequences_and_leaves_a_long_one_alone():
    shares = balance([900, 10, 20, 30, 40, 50, 60, 1200], ranks=1, size=8, budget=1000)
    assert shares == [[[7], [0], [6, 5, 4, 3, 2, 1]]]


def test_response_slices_partition_the_packed_tokens():
    batch = random_batch()
    slices = [batch.response_slice(n) for n in range(batch.num_samples)]
    assert slices[0].start == 0 and slices[-1].stop == batch.num_response_tokens
    assert all(a.stop == b.start for a, b in zip(slices, slices[1:], strict=False))
