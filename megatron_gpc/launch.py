"""Start the ranks of a run on this machine and watch them; recognise ranks that others started."""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import megatron_gpc

GRACE_S = 10.0
"""How long ranks may take to end after SIGTERM before they are killed [s]."""


def adopt_rank() -> bool:
    """Whether this process is one rank of a run, started by torchrun, srun or `run_ranks`.

    torchrun's variables are taken as they are.  Below srun they are filled in from Slurm's, except
    MASTER_ADDR and MASTER_PORT, which the batch script exports because all nodes must agree on
    them.
    """
    if "RANK" in os.environ:
        return True
    if int(os.environ.get("SLURM_STEP_NUM_TASKS", "1")) > 1:
        os.environ["RANK"] = os.environ["SLURM_PROCID"]
        os.environ["LOCAL_RANK"] = os.environ["SLURM_LOCALID"]
        os.environ["WORLD_SIZE"] = os.environ["SLURM_STEP_NUM_TASKS"]
        return True
    return False


def run_ranks(
    arguments: Sequence[str], ranks: int, log_dir: Path, module: str = "megatron_gpc"
) -> int:
    """Run `python -m MODULE ARGUMENTS` as `ranks` processes; the first to fail ends the others.

    Rank 0 writes to this terminal, the others to log_dir/rank_N.log.

    Returns:
        0, or the exit code of the rank that failed first (1 where a signal ended it).
    """
    log_dir.mkdir(parents=True, exist_ok=True)
    port = free_port()
    processes = []
    for rank in range(ranks):
        environment = {
            # One thread a rank: ranks share the cores.
            "OMP_NUM_THREADS": "1",
            **os.environ,
            "PYTHONPATH": own_search_path(),
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(ranks),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }
        log = None if rank == 0 else (log_dir / f"rank_{rank}.log").open("w")
        processes.append(
            subprocess.Popen(
                [sys.executable, "-P", "-m", module, *arguments],  # see own_search_path
                env=environment,
                stdout=log,
                stderr=log,
                preexec_fn=die_with_parent,
            )
        )
        if log:
            log.close()
    try:
        return _watch(processes, log_dir)
    finally:
        _end(processes)


def own_search_path() -> str:
    """PYTHONPATH for a child that is to run this copy of the package, wherever it is started from.

    Such a child is started with `python -P -m`: `-m` alone would look in the current folder first,
    and one of the package's name may lie there.
    """
    root = str(Path(megatron_gpc.__file__).parent.parent)
    return os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))


def free_port() -> int:
    """A port of 127.0.0.1 that nobody listens on at this moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def die_with_parent() -> None:
    """Called in a child before it runs: the kernel kills it when its parent ends in any way."""
    pr_set_pdeathsig = 1
    ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)


def _watch(processes: Sequence[subprocess.Popen[bytes]], log_dir: Path) -> int:
    """Wait until all have ended well, or one has not; see `run_ranks`."""
    while not any(process.poll() for process in processes):
        if all(process.returncode == 0 for process in processes):
            return 0
        time.sleep(0.1)
    # Where one rank dies, gloo ends the others within moments: the first that is seen here need not
    # be the cause.  All get the time to say what they saw; a user's error (2) explains the others.
    time.sleep(1.0)
    failed = {rank: code for rank, process in enumerate(processes) if (code := process.poll())}
    rank = min(failed, key=lambda r: (failed[r] != 2, r))
    log = log_dir / f"rank_{rank}.log"
    if rank > 0:
        print(f"rank {rank} failed; the end of {log}:", file=sys.stderr)
        print("\n".join(log.read_text(errors="replace").splitlines()[-20:]), file=sys.stderr)
    if failed[rank] < 0:
        print(f"rank {rank} was ended by signal {-failed[rank]}", file=sys.stderr)
    return max(failed[rank], 1)


def _end(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    running = [process for process in processes if process.poll() is None]
    for process in running:
        process.terminate()
    deadline = time.monotonic() + GRACE_S
    for process in running:
        try:
            process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
