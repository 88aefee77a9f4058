"""Which part of a run this process is: a rank, or what starts the ranks, all or one node's."""

from __future__ import annotations

import os
from dataclasses import dataclass

from megatron_gpc.config import Config, ParallelConfig
from megatron_gpc.config.layout import check_world, model_parallel_size, nearest, world_size
from megatron_gpc.errors import UserError
from megatron_gpc.run import environment


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


def gpus_for_ranks(config: Config, gpus: int) -> int:
    """How many of a node's GPUs ranks may have: those below sglang.args.base_gpu_id, if that keeps
    the others for engines.

    Args:
        gpus: CUDA devices of this node.

    Raises:
        UserError: the engines need more than there are.
    """
    server, args = config.rollout.server, config.sglang.args
    first = int(args.get("base_gpu_id") or 0)
    apart = server.kind == "sglang" and args.get("device") != "cpu" and not server.colocated
    if not gpus or not first or not apart or config.rollout.replay is not None:
        return gpus
    wanted = server.engines * int(args.get("tp_size", args.get("tp", 1)))
    if first + wanted > gpus:
        raise UserError(
            f"sglang.args.base_gpu_id={first}: engines need {wanted} GPUs from there on "
            f"(rollout.server.engines * sglang.args.tp_size), and this node has {gpus}"
        )
    return first


def adopt_rank(parallel: ParallelConfig, gpus: int) -> bool:
    """Whether this process is one rank of a run, started by torchrun, srun or `run_ranks`.

    torchrun's variables are taken as they are.  Below srun they are filled in from Slurm's, except
    MASTER_ADDR and MASTER_PORT, which the batch script exports because all nodes must agree on
    them.  Where srun has started one task a node, and the layout asks for more or the node has more
    than one GPU, a task is no rank but starts those of its node: see `my_share`.

    Args:
        gpus: CUDA devices that this process sees.

    Raises:
        UserError: the layout does not fit the processes, or a variable cannot be what it is.
    """
    if "RANK" in os.environ:
        check_world(parallel, environment.place(environment.TORCHRUN).world)
        environment.master()
        return True
    tasks, nodes = environment.step()
    if tasks == 1 or (tasks == nodes and (gpus > 1 or world_size(parallel) != tasks)):
        return False
    check_world(parallel, tasks)
    place = environment.place(environment.SRUN)
    environment.master()
    os.environ |= dict(zip(environment.TORCHRUN, map(str, place), strict=True))
    return True


def my_share(parallel: ParallelConfig, gpus: int) -> Share:
    """What this process, which is no rank, has to start: all ranks, or below srun its node's.

    Args:
        gpus: those of this node that are for ranks.  Below srun each gets one, so that parallel.dp
            may be left out.

    Raises:
        UserError: the layout does not fit the nodes, or the batch script has not said where ranks
            meet.
    """
    _, nodes = environment.step()
    in_step = environment.in_step()
    world = world_size(parallel)
    if in_step and gpus and parallel.dp is None:
        world = nodes * gpus
        copy = model_parallel_size(parallel)
        if world % copy:
            raise UserError(
                f"{nodes} nodes with {gpus} GPUs each: parallel.tp * pp * cp = {copy} does not "
                f"divide {world}; ask for "
                f"{nearest(nodes, lambda n: n * gpus % copy == 0, nodes + copy)} nodes"
            )
    if world % nodes:
        raise UserError(
            f"{nodes} nodes cannot share {world} ranks (parallel.tp * pp * cp * dp) evenly; ask "
            f"for {nearest(nodes, lambda n: world % n == 0, world)} nodes"
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
    node = environment.number("SLURM_NODEID", 0, nodes - 1)
    return Share(ranks, node * ranks, world, environment.master())
