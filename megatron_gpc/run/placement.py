"""Which part of a run this process is: a rank, or what starts the ranks, all or one node's."""

from __future__ import annotations

import os
from dataclasses import dataclass

from megatron_gpc.config import ParallelConfig
from megatron_gpc.config.layout import check_world, model_parallel_size, world_size
from megatron_gpc.errors import UserError


@dataclass(frozen=True)
class Share:
    """The ranks that one node starts: `ranks` of `world`, from rank `first`."""

    ranks: int
    first: int
    world: int
    master: tuple[str, int] | None = None
    """Address and port that the ranks of all nodes meet at; None: a free one of this machine."""

    @staticmethod
    def alone(ranks: int) -> Share:
        """All ranks on this machine."""
        return Share(ranks, 0, ranks)


def adopt_rank(parallel: ParallelConfig, gpus: int) -> bool:
    """Whether this process is one rank of a run, started by torchrun, srun or `run_ranks`.

    torchrun's variables are taken as they are.  Below srun they are filled in from Slurm's, except
    MASTER_ADDR and MASTER_PORT, which the batch script exports because all nodes must agree on
    them.  Where srun has started one task a node, and the layout asks for more or the node has more
    than one GPU, a task is no rank but starts those of its node: see `my_share`.

    Args:
        gpus: CUDA devices that this process sees.
    """
    if "RANK" in os.environ:
        return True
    tasks, nodes = _slurm_step()
    if tasks == 1 or (tasks == nodes and (gpus > 1 or world_size(parallel) != tasks)):
        return False
    check_world(parallel, tasks)
    os.environ["RANK"] = os.environ["SLURM_PROCID"]
    os.environ["LOCAL_RANK"] = os.environ["SLURM_LOCALID"]
    os.environ["WORLD_SIZE"] = os.environ["SLURM_STEP_NUM_TASKS"]
    return True


def my_share(parallel: ParallelConfig, gpus: int) -> Share:
    """What this process, which is no rank, has to start: all ranks, or below srun its node's.

    Args:
        gpus: CUDA devices of this node.  Below srun each gets a rank, so that parallel.dp may be
            left out.

    Raises:
        UserError: the layout does not fit the nodes, or the batch script has not said where ranks
            meet.
    """
    _, nodes = _slurm_step()
    in_step = "SLURM_STEP_ID" in os.environ
    world = world_size(parallel)
    if in_step and gpus and parallel.dp is None:
        world = nodes * gpus
        copy = model_parallel_size(parallel)
        if world % copy:
            raise UserError(
                f"{nodes} nodes with {gpus} GPUs each: parallel.tp * pp * cp = {copy} does not "
                f"divide {world}"
            )
    if world % nodes:
        raise UserError(
            f"{nodes} nodes cannot share {world} ranks (parallel.tp * pp * cp * dp) evenly; ask "
            "for another number of nodes"
        )
    ranks = world // nodes
    if in_step and gpus and ranks != gpus:
        raise UserError(
            f"{nodes} nodes with {gpus} GPUs each, but parallel.tp * pp * cp * dp = {world} needs "
            f"{ranks} a node; change the layout, --nodes or --gpus-per-node, or leave out "
            "parallel.dp"
        )
    if nodes == 1:
        return Share.alone(world)
    if not {"MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys():
        raise UserError(
            "srun started this on several nodes, but MASTER_ADDR and MASTER_PORT do not say where "
            "they meet; submit slurm/train.sbatch, or export both in the batch script"
        )
    master = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    return Share(ranks, int(os.environ["SLURM_NODEID"]) * ranks, world, master)


def _slurm_step() -> tuple[int, int]:
    """(tasks, nodes) of the step that srun started this process in; (1, 1) elsewhere."""
    names = "SLURM_STEP_NUM_TASKS", "SLURM_STEP_NUM_NODES"
    tasks, nodes = (int(os.environ.get(name, "1")) for name in names)
    return tasks, nodes
