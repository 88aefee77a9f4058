"""A reference model that scores in the policy's place leaves no trace, and stays what it was."""

from __future__ import annotations

from dataclasses import replace

import pytest
import ranks
import torch
from tiny import random_batch, run_config
from tiny_models import make_model

from megatron_gpc.algo.clipping import affine_bounds

BOUNDS = affine_bounds((-0.25, 0.5), (-0.13, 0.3))
BF16 = "model.dtype=bfloat16"


@pytest.mark.parametrize(
    ("world", "model", "layout"),
    [
        (2, "qwen2-tied", ["parallel.dp=2", BF16]),
        (2, "qwen2-tied", ["parallel.pp=2", BF16, "optim.distributed=false"]),
        (2, "qwen3", ["parallel.tp=2"]),
        (2, "qwen3_moe", ["parallel.dp=2", "parallel.ep=2", "optim.distributed=false"]),
    ],
    ids=str,
)
def test_updates_are_those_without_a_reference_and_its_log_probs_are_its_own(
    pool, tmp_path, world, model, layout
):
    for name, seed in (("hf", 0), ("other", 1)):
        made = make_model(model)
        torch.manual_seed(seed)
        with torch.no_grad():
            for parameter in made.parameters():
                parameter += 0.05 * torch.randn_like(parameter)
        made.save_pretrained(tmp_path / name)
    config = run_config(
        tmp_path, tmp_path / "hf", "kl.coef=0.1", f"kl.reference={tmp_path}/other", *layout
    )
    batches = [random_batch()] * 3
    found = pool(world).run(ranks.after_updates, config, batches, BOUNDS, False, True)
    without = pool(world).run(ranks.after_updates, config, batches, BOUNDS)
    as_policy = replace(config, model=replace(config.model, hf=tmp_path / "other"))
    other = pool(world).run(ranks.after_updates, as_policy, batches[:1], BOUNDS)[0]["scores"][0]
    for got, want in zip(found, without, strict=True):
        assert got["updates"] == want["updates"] and got["metrics"] == want["metrics"]
        for kind in ("scores", "weights", "moments"):
            assert len(got[kind]) == len(want[kind]) > 0
            assert all(map(torch.equal, got[kind], want[kind])), kind
        assert len(got["references"]) == 3
        assert all(torch.equal(scores, other) for scores in got["references"])
    assert not torch.equal(other, found[0]["scores"][0])
    assert not torch.equal(found[0]["scores"][0], found[0]["scores"][2]), "the policy has moved"
