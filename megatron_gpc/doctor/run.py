"""All that the doctor does, on one process or on each of several."""

from __future__ import annotations

import dataclasses
import socket
import sys
from collections.abc import Sequence
from pathlib import Path

from megatron_gpc.config import Config
from megatron_gpc.doctor.finding import Finding
from megatron_gpc.doctor.machine import machine
from megatron_gpc.doctor.meeting import (
    FAREWELL_S,
    Meeting,
    Rendezvous,
    all_reduce,
    missing,
    shared_folder,
)
from megatron_gpc.doctor.plan import plan
from megatron_gpc.doctor.report import Told, last_words, table, with_differences
from megatron_gpc.doctor.software import software
from megatron_gpc.metrics.tables import print_table


def examine(
    config: Config | None,
    *,
    shared: Sequence[Path],
    ports: Sequence[int],
    sglang_python: Path | None,
    timeout_s: float,
) -> int:
    """Look at this node, and with the other processes at all; rank 0 prints the table.

    Args:
        config: to hold the nodes against; None: none.
        shared: folders that all nodes must share.
        ports: that must be free on every node.
        sglang_python: interpreter of SGLang's environment, if that is to be looked at.
        timeout_s: how long the processes wait for each other, for each part.

    Returns:
        0; 1 if a problem was found on any process.

    Raises:
        UserError: nothing says where the processes meet.
    """
    place, host = Rendezvous.from_environment(), socket.gethostname()
    broadcast = config is not None and config.rollout.server.sync == "distributed"
    own = software(sglang_python, broadcast)
    own += machine(place.address, ports if place.local_rank == 0 else ())
    if config is not None:
        own += plan(config, whole=place.rank == 0)
    if place.world == 1:
        own += [shared_folder(None, folder) for folder in shared]
        advice = "start it with srun on every node to look at the network"
        own.append(Finding("all-reduce", "note", "one process, nothing to add up", advice))
        return _say([(host, finding) for finding in own])
    try:
        meeting = Meeting(place, timeout_s)
    except OSError as error:
        met = f"{place.address}:{place.port}: {error}"
        advice = "another program has the port, rank 0 did not start, or no route: see above"
        return _say([(host, f) for f in (*own, Finding("rendezvous", "problem", met, advice))])
    return _together(meeting, own, shared, timeout_s)


def _together(
    meeting: Meeting, own: list[Finding], shared: Sequence[Path], timeout_s: float
) -> int:
    place, host, main = meeting.place, socket.gethostname(), meeting.place.rank == 0
    meeting.tell("here", True)
    absent: list[Told] = []
    if main:
        absent = missing(meeting.all_heard("here"), timeout_s)
        meeting.tell("complete", not absent)
    meeting.extend(timeout_s)
    if meeting.heard("complete", 0, 2 * timeout_s):
        meeting.extend(timeout_s)
        own += [shared_folder(meeting, folder) for folder in shared]
        own.append(all_reduce(meeting))
    meeting.tell("found", [host, [dataclasses.asdict(finding) for finding in own]])
    meeting.extend(timeout_s)
    if main:
        told = list(absent)
        for rank in range(place.world):
            waiting = 0.0 if absent else meeting.left()
            said = meeting.heard("found", rank, waiting + FAREWELL_S)
            if said is not None:
                told += [(said[0], Finding(**values)) for values in said[1]]
            elif not absent:
                told += missing([True] * rank + [None], timeout_s)
        code = _say(told)
        meeting.tell("verdict", code)
        for rank in range(1, place.world):
            meeting.heard("bye", rank, 0.0 if absent else FAREWELL_S)
        return code
    verdict = meeting.heard("verdict", 0, 2 * timeout_s)
    meeting.tell("bye", True)
    if verdict is None:
        print(f"megatron-gpc: {host}: rank 0 has gone", file=sys.stderr)
    return 1 if verdict is None else int(verdict)


def _say(told: list[Told]) -> int:
    told = with_differences(told)
    print_table(table(told))
    print(last_words(told), flush=True)
    return int(any(finding.status == "problem" for _, finding in told))
