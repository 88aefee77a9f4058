"""An update whose loss or gradient is not finite changes nothing, whichever rank saw it."""

from __future__ import annotations

import dataclasses
import math

import checkpoint_ranks
import pytest
import ranks
import torch
from tiny import random_batch, run_config, tiny_qwen2

from megatron_gpc.algo.clipping import affine_bounds
from megatron_gpc.batching import pack
from megatron_gpc.types import RolloutBatch

BOUNDS = affine_bounds((-0.25, 0.5), (-0.13, 0.3))


@pytest.fixture(scope="module")
def hf(tmp_path_factory):
    return tiny_qwen2(tmp_path_factory.mktemp("skipped") / "hf")


def poisoned(batch: RolloutBatch) -> RolloutBatch:
    """One token of one sample has an old probability of 0: its gradient's norm overflows."""
    return run_away(batch, -torch.inf)


def run_away(batch: RolloutBatch, old_logp: float) -> RolloutBatch:
    """One token of one sample has this old log-prob and A < 0: the loss is not clipped there."""
    advantages_N = batch.advantages_N.clone()
    advantages_N[3] = -1.0
    rollout_logp_T = batch.rollout_logp_T.clone()
    rollout_logp_T[batch.response_slice(3).start] = old_logp
    return dataclasses.replace(batch, advantages_N=advantages_N, rollout_logp_T=rollout_logp_T)


@pytest.mark.parametrize(
    ("world", "layout"),
    [
        (1, ["optim.clip_grad=0"]),
        (2, ["parallel.dp=2"]),
        (2, ["parallel.dp=2", "optim.distributed=false", "optim.clip_grad=0"]),
        (2, ["parallel.tp=2"]),
        (2, ["parallel.pp=2", "model.dtype=bfloat16"]),
    ],
    ids=str,
)
def test_the_next_update_goes_on_as_if_it_had_not_been(hf, pool, tmp_path, world, layout):
    config = run_config(tmp_path, hf, "optim.warmup_updates=4", *layout)
    good = random_batch()
    both = pool(world).run(ranks.after_updates, config, [good, poisoned(good), good], BOUNDS)
    alone = pool(world).run(ranks.after_updates, config, [good, good], BOUNDS)
    for got, want in zip(both, alone, strict=True):
        assert [update["skipped"] for update in got["updates"]] == [False, True, False]
        assert not math.isfinite(got["updates"][1]["grad_norm"])
        assert [got["updates"][0], got["updates"][2]] == want["updates"]
        assert got["scheduler"] == want["scheduler"] and got["metrics"] == want["metrics"]
        for kind in ("weights", "moments"):
            assert len(got[kind]) == len(want[kind]) > 0
            assert all(map(torch.equal, got[kind], want[kind]))


@pytest.mark.parametrize(
    ("world", "layout"),
    [
        (1, []),
        (2, ["parallel.dp=2"]),
        (2, ["parallel.dp=2", "optim.distributed=false"]),
        (2, ["parallel.tp=2"]),
        (2, ["parallel.pp=2", "model.dtype=bfloat16"]),
    ],
    ids=str,
)
def test_an_empty_step_changes_nothing_at_any_layout_and_is_resumed_from(
    hf, pool, tmp_path, world, layout
):
    """Nothing at first, then one sample for two ranks, then nothing again."""
    config = run_config(tmp_path, hf, "optim.warmup_updates=4", *layout)
    empty, good = pack([], torch.zeros(0)), random_batch()
    one = dataclasses.replace(random_batch(1, 1), advantages_N=torch.ones(1))
    both = pool(world).run(ranks.after_updates, config, [empty, one, empty, good], BOUNDS)
    alone = pool(world).run(ranks.after_updates, config, [one, good], BOUNDS)
    for got, want in zip(both, alone, strict=True):
        assert [update["empty"] for update in got["updates"]] == [True, False, True, False]
        assert [got["updates"][1], got["updates"][3]] == want["updates"]
        assert [len(scores) for scores in got["scores"]][::2] == [0, 0]
        assert got["scheduler"] == want["scheduler"] and got["metrics"] == want["metrics"]
        for kind in ("weights", "moments"):
            assert len(got[kind]) == len(want[kind]) > 0
            assert all(map(torch.equal, got[kind], want[kind]))
    for first, resumed, change in pool(world).run(checkpoint_ranks.saved_before_any_update, config):
        assert first == resumed
        assert (
            math.isnan(change["dh_measured"])
            and change["dh_directional"] == change["dh_second_order"] == 0
        )


@pytest.mark.parametrize(
    ("world", "layout"),
    [
        (1, []),
        (2, ["parallel.dp=2", "optim.distributed=false"]),
        (2, ["parallel.tp=2"]),
        (2, ["parallel.pp=2", "model.dtype=bfloat16"]),
    ],
    ids=str,
)
def test_an_infinite_loss_with_a_finite_gradient_is_skipped_by_all(
    hf, pool, tmp_path, world, layout
):
    """A sample's tokens are clipped from above and pass no gradient; their losses exceed fp32."""
    batch = random_batch()
    batch.advantages_N[3] = 3e38
    batch.rollout_logp_T[batch.response_slice(3)] = -40.0
    config = run_config(tmp_path, hf, *layout)
    for result in pool(world).run(ranks.after_updates, config, [batch], BOUNDS):
        assert [update["skipped"] for update in result["updates"]] == [True]


@pytest.mark.parametrize("old_logp", [-100.0, -3e38])
def test_a_token_that_ran_far_away_is_trained_on(hf, pool, tmp_path, old_logp):
    """Its ratio would overflow; bounded, it leaves loss, gradient and every metric finite."""
    batch = run_away(random_batch(), old_logp)
    (result,) = pool(1).run(ranks.after_updates, run_config(tmp_path, hf), [batch], BOUNDS)
    (update,) = result["updates"]
    assert not update["skipped"] and math.isfinite(update["grad_norm"])
    assert all(map(math.isfinite, result["metrics"].values())), result["metrics"]
