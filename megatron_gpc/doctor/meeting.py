"""What processes look at together: who comes, the shared folder, a short all-reduce.

They meet at a store that rank 0 holds.  Every wait ends at one deadline, so that a rank that never
comes is named and nobody hangs.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import secrets
import socket
import subprocess
import time
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_gpc.doctor.finding import Finding
from megatron_gpc.run import environment

FAREWELL_S = 5.0
"""How long rank 0 keeps the store open at the end, so that the others can read the verdict [s]."""
STORE_POLL_S = 0.05


@dataclasses.dataclass(frozen=True)
class Rendezvous:
    """Which of how many processes this is."""

    rank: int = 0
    world: int = 1
    local_rank: int = 0
    address: str = "127.0.0.1"
    port: int = 0

    @staticmethod
    def from_environment() -> Rendezvous:
        """As torchrun or srun has started it; alone if neither has.

        Raises:
            UserError: several processes, and nothing says where they meet.
        """
        if "RANK" in os.environ:
            place = environment.place(environment.TORCHRUN)
        elif environment.step()[0] > 1:
            place = environment.place(environment.SRUN)
        else:
            return Rendezvous()
        if "MASTER_ADDR" not in os.environ and (hosts := _step_hosts()):
            return Rendezvous(*place, hosts[0], _step_port())
        return Rendezvous(*place, *environment.master())


class Meeting:
    """The store of some processes, until `deadline`."""

    def __init__(self, place: Rendezvous, timeout_s: float):
        """Rank 0 opens the store, the others find it.

        Raises:
            OSError: it cannot be opened, or was not found in time.
        """
        self.place, self.deadline = place, time.monotonic() + timeout_s
        held_by_torchrun = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        try:
            self.store = dist.TCPStore(
                place.address,
                place.port,
                is_master=place.rank == 0 and not held_by_torchrun,
                timeout=timedelta(seconds=timeout_s),
                wait_for_workers=False,
            )
        except (dist.DistError, RuntimeError) as error:  # what torch makes of an OSError
            raise OSError(str(error).splitlines()[0]) from None

    def extend(self, timeout_s: float) -> None:
        """Begin another part, with a deadline of its own."""
        self.deadline = time.monotonic() + timeout_s

    def left(self) -> float:
        return max(0.0, self.deadline - time.monotonic())

    def tell(self, what: str, value: object) -> None:
        self.store.set(f"doctor/{what}/{self.place.rank}", json.dumps(value))

    def heard(self, what: str, rank: int, timeout_s: float | None = None) -> Any:
        """What a rank reports; None if it does not report in time."""
        key = f"doctor/{what}/{rank}"
        until = self.deadline if timeout_s is None else time.monotonic() + timeout_s
        while not self.store.check([key]):
            if time.monotonic() > until:
                return None
            time.sleep(STORE_POLL_S)
        return json.loads(self.store.get(key))

    def all_heard(self, what: str) -> list[Any]:
        """What each rank tells, in their order; None for those that do not in time."""
        return [self.heard(what, rank) for rank in range(self.place.world)]


def _step_hosts() -> list[str]:
    """Nodes of the step that srun started this process in; none elsewhere."""
    nodes = os.environ.get("SLURM_STEP_NODELIST")
    if nodes is None:
        return []
    asked = ["scontrol", "show", "hostnames", nodes]
    try:
        return subprocess.run(asked, capture_output=True, text=True, timeout=30).stdout.split()
    except (OSError, subprocess.TimeoutExpired):  # a container without Slurm
        return []


def _step_port() -> int:
    """Where processes meet that srun started from a shell: the last port of the job's block, see
    slurm/common.sh."""
    return 20000 + environment.number("SLURM_JOB_ID", 0, 2**31) % 300 * 40 + 39


def host_of(rank: int) -> str:
    """Where Slurm has placed a rank that did not come, by the allocation's nodes in blocks."""
    names, tasks = _step_hosts(), os.environ.get("SLURM_STEP_TASKS_PER_NODE")
    if not names or tasks is None:
        return f"rank {rank}'s node"
    counts: list[int] = []
    for count, times in re.findall(r"(\d+)(?:\(x(\d+)\))?", tasks):
        counts += [int(count)] * int(times or 1)
    for name, count in zip(names, counts, strict=False):
        if rank < count:
            return name
        rank -= count
    return f"rank {rank}'s node"


def shared_folder(meeting: Meeting | None, folder: Path) -> Finding:
    """Rank 0 writes a file, every rank must see it."""
    check, host = f"folder {folder}", socket.gethostname()
    if not folder.is_dir():
        told = False
        finding = Finding(check, "problem", f"not there on {host}", "mount it, or make it")
    else:
        told, finding = True, Finding(check, "ok", "written and seen")
    place = meeting.place if meeting else Rendezvous()
    name = None
    if place.rank == 0 and told:
        name = f".canary-{secrets.token_hex(8)}"
        try:
            (folder / name).write_text(host)
        except OSError as error:
            name = None
            finding = Finding(
                check, "problem", f"cannot be written: {error.strerror}", "see its rights, quota"
            )
    if meeting is None:
        _remove(folder, name)
        return finding
    if place.rank == 0:
        meeting.tell(f"canary {folder}", name)
    written = meeting.heard(f"canary {folder}", 0)
    if told and written is not None and not _appears(folder / str(written), meeting):
        advice = "it is another folder there: mount the shared one"
        finding = Finding(check, "problem", f"{host} does not see what rank 0 wrote", advice)
    meeting.tell(f"seen {folder}", True)
    if place.rank == 0:
        meeting.all_heard(f"seen {folder}")
        _remove(folder, name)
    return finding


def _remove(folder: Path, name: str | None) -> None:
    if name is not None:
        (folder / name).unlink(missing_ok=True)


def _appears(file: Path, meeting: Meeting) -> bool:
    """Network file systems may take seconds to show a new file."""
    until = time.monotonic() + min(10.0, meeting.left())
    while not file.exists():
        if time.monotonic() > until:
            return False
        os.listdir(file.parent)
        time.sleep(STORE_POLL_S)
    return True


def all_reduce(meeting: Meeting) -> Finding:
    """A sum over all ranks, over NCCL if there are GPUs, else over gloo."""
    place, cuda = meeting.place, torch.cuda.is_available()
    backend = "nccl" if cuda else "gloo"
    os.environ["TORCH_NCCL_BLOCKING_WAIT"] = "1"  # or a peer that is lost would end us unheard
    if cuda:
        torch.cuda.set_device(place.local_rank)
    begin = time.monotonic()
    try:
        dist.init_process_group(
            backend,
            store=dist.PrefixStore("doctor/all-reduce", meeting.store),
            rank=place.rank,
            world_size=place.world,
            timeout=timedelta(seconds=max(1.0, meeting.left())),
        )
        ones = torch.ones(2**20, device="cuda" if cuda else "cpu")
        dist.all_reduce(ones)
        total = float(ones[0])
    except (dist.DistError, RuntimeError) as error:
        advice = "see interface and adapters above, and firewalls between nodes"
        return Finding("all-reduce", "problem", f"{backend}: {str(error).splitlines()[0]}", advice)
    if total != place.world:
        advice = "leave the node out and tell the administrators"
        return Finding("all-reduce", "problem", f"{total} instead of {place.world}", advice)
    said = f"{place.world} ranks over {backend}, {time.monotonic() - begin:.1f} s with start"
    return Finding("all-reduce", "ok", said)


def missing(heard: Sequence[object], timeout_s: float) -> list[tuple[str, Finding]]:
    """(host, problem) for every rank that has told nothing."""
    advice = "see whether its node is up and reaches MASTER_ADDR:MASTER_PORT; else leave it out"
    return [
        (
            host_of(rank),
            Finding(f"rank {rank}", "problem", f"did not come within {timeout_s:g} s", advice),
        )
        for rank, said in enumerate(heard)
        if said is None
    ]
