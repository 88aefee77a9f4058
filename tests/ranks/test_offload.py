"""Training state that was in CPU memory between updates gives the same updates, to the bit."""

from __future__ import annotations

import pytest
import ranks
import torch
from tiny import random_batch, run_config, tiny_qwen2

from megatron_gpc.algo.clipping import affine_bounds

BOUNDS = affine_bounds((-0.25, 0.5), (-0.13, 0.3))


def hold_to_each_other(pool, config, parameters: int) -> None:
    """Runs with and without offloading; as many bytes are freed as Adam needs."""
    batches = [random_batch(seed=seed) for seed in range(3)]
    away = pool.run(ranks.after_updates, config, batches, BOUNDS, True)
    stays = pool.run(ranks.after_updates, config, batches, BOUNDS)
    for got, want in zip(away, stays, strict=True):
        assert got["updates"] == want["updates"] and got["metrics"] == want["metrics"]
        for kind in ("scores", "weights", "moments"):
            assert len(got[kind]) == len(want[kind]) > 0
            assert all(map(torch.equal, got[kind], want[kind])), kind
        assert want["freed"] == []
    first, second, third = (sum(got["freed"][i] for got in away) for i in range(3))
    assert first >= 4 * parameters, "gradients"
    assert second >= first + 8 * parameters, "and both of Adam's moments"
    assert third > first


@pytest.mark.parametrize(
    ("world", "layout"),
    [
        (1, []),
        (2, ["parallel.dp=2", "model.dtype=bfloat16"]),
        (2, ["parallel.dp=2", "optim.distributed=false", "model.dtype=bfloat16"]),
        (2, ["parallel.tp=2"]),
    ],
    ids=str,
)
def test_updates_are_those_without_offloading(pool, tmp_path, world, layout):
    hf = tiny_qwen2(tmp_path / "hf")
    config = run_config(tmp_path, hf, *layout)
    hold_to_each_other(pool(world), config, parameters=30_000)
