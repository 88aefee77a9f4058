from __future__ import annotations

import math
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

from megatron_gpc.metrics.reduce import Sums


@pytest.fixture
def one_rank():
    dist.init_process_group(
        "gloo", store=dist.HashStore(), rank=0, world_size=1, timeout=timedelta(seconds=30)
    )
    yield
    dist.destroy_process_group()


def _tokens(part: int) -> torch.Tensor:
    """Values of one micro-batch: 1 to 40 tokens, as their number and size differ in a run."""
    generator = torch.Generator().manual_seed(part)
    count = int(torch.randint(1, 41, (), generator=generator))
    return torch.randn(count, generator=generator) * (part + 1)


def _reduce_tokens() -> dict[str, float]:
    """Ranks 0 and 1 hold the last pipeline stage, the others an earlier one."""
    rank = dist.get_rank()
    sums = Sums(["mean", "share", "nobody"], ["max", "lowest"])
    if rank < 2:
        for part in range(rank, 7, 2):  # 4 micro-batches on rank 0, 3 on rank 1
            values_T = _tokens(part)
            sums.add("mean", values_T.sum(), values_T.numel())
            sums.add("share", (values_T > 1).sum(), values_T.numel())
            sums.add_max("max", values_T.max())
            sums.add_max("lowest", -5.0 - rank)
    return sums.reduce()


def test_ranks_with_unequal_micro_batches_and_some_without_any_agree_with_float64(pool):
    results = pool(4).run(_reduce_tokens)
    everything = torch.cat([_tokens(part) for part in range(7)]).double()
    assert results[0]["mean"] == pytest.approx(everything.mean().item(), rel=1e-6)
    assert results[0]["share"] == (everything > 1).double().mean().item()
    assert results[0]["max"] == everything.max().item()
    assert results[0]["lowest"] == -5.0
    for result in results:  # the same bits on every rank, those without tokens included
        assert math.isnan(result.pop("nobody"))
        assert result == {key: results[0][key] for key in result}
        assert list(result) == ["mean", "share", "max", "lowest"]


def test_a_mean_is_over_tokens_and_not_over_micro_batches(one_rank):
    sums = Sums(["clip_fraction"])
    sums.add("clip_fraction", 1, 1)
    sums.add("clip_fraction", torch.tensor(0), 99)
    assert sums.reduce() == {"clip_fraction": 0.01}


def test_sums_stay_exact_where_fp32_would_not(one_rank):
    sums = Sums(["mean"])
    sums.add("mean", torch.tensor(2.0**24), 1)
    for _ in range(3):
        sums.add("mean", torch.tensor(1.0), 0)  # 2**24 + 1 has no fp32
    assert sums.reduce()["mean"] == 2.0**24 + 3


def test_numbers_and_tensors_of_any_one_element_shape_and_type_are_accepted(one_rank):
    sums = Sums(["mean"], ["max"])
    weight = torch.tensor([[2.0]], requires_grad=True)
    sums.add("mean", weight * 2, torch.tensor(True))
    sums.add("mean", torch.tensor([3], dtype=torch.int32), 2.0)
    sums.add_max("max", weight)
    sums.add_max("max", 1)
    assert sums.reduce() == {"mean": 7 / 3, "max": 2.0}


def test_reducing_takes_two_collectives_and_leaves_the_sums_as_they_are(one_rank, monkeypatch):
    calls = []
    all_reduce = dist.all_reduce
    monkeypatch.setattr(
        dist,
        "all_reduce",
        lambda tensor, **how: calls.append(how["op"]) or all_reduce(tensor, **how),
    )
    sums = Sums([f"mean_{i}" for i in range(9)], [f"max_{i}" for i in range(5)])
    for i in range(9):
        sums.add(f"mean_{i}", i, 2)
    first = sums.reduce()
    assert calls == [dist.ReduceOp.SUM, dist.ReduceOp.MAX]
    sums.add("mean_8", 4, 2)
    assert first["mean_8"] == 4.0 and sums.reduce()["mean_8"] == 3.0


def test_what_nobody_added_is_nan(one_rank):
    assert all(math.isnan(value) for value in Sums(["mean"], ["max"]).reduce().values())


def test_an_unknown_name_is_refused():
    with pytest.raises(KeyError, match="reward"):
        Sums(["loss"]).add("reward", 1, 1)
