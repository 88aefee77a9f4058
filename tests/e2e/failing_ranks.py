"""`python -m failing_ranks raises|killed RANK`: one rank fails, the others wait for it."""

from __future__ import annotations

import os
import signal
import sys
from datetime import timedelta

import torch.distributed as dist
from torch.distributed.elastic.multiprocessing.errors import record


@record
def main(how: str, rank: int) -> None:
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    dist.barrier()
    if dist.get_rank() == rank:
        if how == "raises":
            raise ValueError(f"rank {rank} cannot go on")
        os.kill(os.getpid(), signal.SIGKILL)
    dist.barrier()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
