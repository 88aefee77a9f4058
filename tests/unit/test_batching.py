"""Packing, mini-batches and micro-batches lose and repeat nothing."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import random_batch

from megatron_gpc.batching import micro_batches, mini_batches, padded_length


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


@settings(max_examples=40)
@given(st.integers(1, 5), st.integers(1, 5), st.integers(1, 4), st.integers(1, 16))
def test_micro_batches_of_all_ranks_hold_every_token_once(ranks, size, multiple, chosen):
    batch = random_batch()
    samples = list(range(chosen))
    length = padded_length(batch, 4)
    made = [
        micro_batches(
            batch, samples, rank=rank, ranks=ranks, size=size, length=length, multiple=multiple
        )
        for rank in range(ranks)
    ]
    counts = {len(one) for one in made}
    assert len(counts) == 1 and counts.pop() % multiple == 0
    slots, targets = [], []
    for micro in (m for one in made for m in one):
        assert micro.tokens_BS.shape == (size, length)
        # each row's next token is the target that it predicts
        assert torch.equal(micro.tokens_BS.flatten()[micro.rows_T + 1], micro.targets_T)
        slots += micro.slots_T.tolist()
        targets += micro.targets_T.tolist()
    tokens = int(batch.response_lengths_N[:chosen].sum())
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


def test_response_slices_partition_the_packed_tokens():
    batch = random_batch()
    slices = [batch.response_slice(n) for n in range(batch.num_samples)]
    assert slices[0].start == 0 and slices[-1].stop == batch.num_response_tokens
    assert all(a.stop == b.start for a, b in zip(slices, slices[1:], strict=False))
