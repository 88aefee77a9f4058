"""What srun has started: a rank, or what starts the ranks of a node."""

from __future__ import annotations

import os

import pytest
from tiny import run_config

from megatron_gpc.config import ParallelConfig
from megatron_gpc.errors import UserError
from megatron_gpc.run.placement import Share, adopt_rank, gpus_for_ranks, my_share

VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@pytest.fixture
def step(monkeypatch):
    """step(tasks, nodes): as srun starts the last of so many tasks."""

    def make(tasks: int, nodes: int) -> None:
        for name in VARIABLES:  # set first, so that what adopt_rank sets is undone as well
            monkeypatch.setenv(name, "")
            monkeypatch.delenv(name)
        monkeypatch.setenv("MASTER_ADDR", "node1")
        monkeypatch.setenv("MASTER_PORT", "20000")
        for name, value in {
            **{"STEP_ID": 0, "STEP_NUM_TASKS": tasks, "STEP_NUM_NODES": nodes},
            **{"PROCID": tasks - 1, "LOCALID": tasks // nodes - 1, "NODEID": nodes - 1},
        }.items():
            monkeypatch.setenv(f"SLURM_{name}", str(value))

    return make


def test_one_task_a_gpu_is_a_rank(step):
    step(tasks=16, nodes=2)
    assert adopt_rank(ParallelConfig(tp=4), gpus=8)
    assert [os.environ[n] for n in ("RANK", "LOCAL_RANK", "WORLD_SIZE")] == ["15", "7", "16"]


@pytest.mark.parametrize("dp", [None, 8])
def test_one_task_a_node_of_several_gpus_is_never_a_rank(step, dp):
    step(tasks=2, nodes=2)
    assert not adopt_rank(ParallelConfig(tp=2, dp=dp), gpus=8), "also where tp * pp = nodes"
    assert my_share(ParallelConfig(tp=2, dp=dp), gpus=8) == Share(8, 8, 16, ("node1", 20000))
    with pytest.raises(UserError, match="but parallel.tp \\* pp \\* cp \\* dp = 2 needs 1 a node"):
        my_share(ParallelConfig(tp=2, dp=1), gpus=8)


@pytest.mark.parametrize("gpus", [0, 1])
def test_one_task_a_node_is_a_rank_where_the_layout_asks_for_one(step, gpus):
    step(tasks=2, nodes=2)
    assert adopt_rank(ParallelConfig(tp=2), gpus)
    step(tasks=2, nodes=2)
    assert not adopt_rank(ParallelConfig(tp=2, pp=2), gpus)


SPLIT = ("rollout.server.kind=sglang", "sglang.args.base_gpu_id=2", "sglang.args.tp_size=2")


def test_ranks_leave_engines_on_their_node_the_gpus_that_these_begin_at(step, tmp_path):
    config = run_config(tmp_path, tmp_path, *SPLIT)
    gpus = gpus_for_ranks(config, 4)
    assert gpus == 2
    step(tasks=1, nodes=1)
    assert not adopt_rank(config.parallel, gpus)
    assert my_share(ParallelConfig(), gpus) == Share(2, 0, 2), "a rank on each, dp left out"
    assert my_share(ParallelConfig(dp=2), gpus) == Share(2, 0, 2)
    with pytest.raises(UserError, match="with 2 GPUs each"):
        my_share(ParallelConfig(dp=4), gpus)
    with pytest.raises(UserError, match="engines need 2 GPUs from there on.* has 3"):
        gpus_for_ranks(config, 3)
    assert gpus_for_ranks(config, 0) == 0, "on a CPU"


@pytest.mark.parametrize(
    "overrides",
    [(), SPLIT[1:], (*SPLIT, "sglang.args.device=cpu"), (*SPLIT, "rollout.server.colocated=true")],
    ids=str,
)
def test_without_engines_on_gpus_of_their_own_ranks_have_all(tmp_path, overrides):
    assert gpus_for_ranks(run_config(tmp_path, tmp_path, *overrides), 4) == 4
