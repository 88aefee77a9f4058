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


def run_ranks(arguments: Sequence[str], ranks: int, log_dir: Path) -> int:
    """Run `megatron-gpc ARGUMENTS` as `ranks` processes; the first to fail ends the others.

    Rank 0 writes to this terminal, the others to log_dir/rank_N.log.

    Returns:
        0, or the exit code of the rank that failed first (1 where a signal ended it).
    """
    log_dir.mkdir(parents=True, exist_ok=True)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    processes = []
    for rank in range(ranks):
        environment = {
            # One thread a rank: ranks share the cores.
            "OMP_NUM_THREADS": "1",
            **os.environ,
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(ranks),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }
        log = None if rank == 0 else (log_dir / f"rank_{rank}.log").open("w")
        processes.append(
            subprocess.Popen(
                [sys.executable, "-m", "megatron_gpc", *arguments],
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


def die_with_parent() -> None:
    """Called in a child before it runs: the kernel kills it when its parent ends in any way."""
    pr_set_pdeathsig = 1
    ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)


def _watch(processes: Sequence[subprocess.Popen[bytes]], log_dir: Path) -> int:
    while True:
        codes = [process.poll() for process in processes]
        failed = [rank for rank, code in enumerate(codes) if code]
        if failed:
            # Where one rank dies, gloo ends the others within moments: the cause may not be the
            # first that is seen here, so they all get the time to say what they saw.
            time.sleep(1.0)
            rank = next((r for r in failed if codes[r] == 2), failed[0])
            if rank:
                print(
                    f"rank {rank} failed; the end of {log_dir / f'rank_{rank}.log'}:",
                    file=sys.stderr,
                )
                lines = (log_dir / f"rank_{rank}.log").read_text(errors="replace").splitlines()
                print("\n".join(lines[-20:]), file=sys.stderr)
            code = codes[rank]
            assert code
            if code < 0:
                print(f"rank {rank} was ended by signal {-code}", file=sys.stderr)
            return max(code, 1)
        if all(code == 0 for code in codes):
            return 0
        time.sleep(0.1)


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
