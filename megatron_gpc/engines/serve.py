"""Engines for runs elsewhere: started and watched on one node, or by srun on several."""

from __future__ import annotations

import dataclasses
import os
import socket
import time
from pathlib import Path

from megatron_gpc.config import Config
from megatron_gpc.engines.fleet import Fleet
from megatron_gpc.engines.keys import key_beside, shared_key
from megatron_gpc.engines.process import ServerError
from megatron_gpc.engines.starter import Starter, check_start, sglang_of
from megatron_gpc.errors import RunStopped, UserError
from megatron_gpc.run import environment
from megatron_gpc.run.files import replace_text
from megatron_gpc.run.network import own_address
from megatron_gpc.run.say import say
from megatron_gpc.run.stop import StopRequest
from megatron_gpc.weights.folders import hf_folder

FLEET_POLL_S = 0.5


def serve(config: Config, stop: StopRequest) -> None:
    """Start rollout.server.engines engines on this node and watch them until `stop`.

    When the engines of all nodes are up, rollout.server.urls_file appears with their addresses,
    which `train` with the same configuration waits for.  Every task of an srun calls it, one a
    node.

    Args:
        config: one that doctor.preflight.check_serving accepts.

    Raises:
        UserError: engines cannot start here, or the model is not there in time.
        RunStopped: an engine did not start, or none is left.
    """
    stop.doing = "the engines end"
    if environment.in_step():
        stop.doing = "the engines answer until the batch script ends them"
    server = config.rollout.server
    urls_file = server.urls_file
    assert urls_file is not None  # check_serving has seen to it
    started_here = dataclasses.replace(server, urls=(), urls_file=None, router=False)
    nodes, _ = environment.step()
    number = environment.number("SLURM_PROCID", 0, nodes - 1, default=0)
    check_start(started_here, config.sglang, _address(nodes))
    try:
        urls_file.parent.mkdir(parents=True, exist_ok=True)
        urls_file.unlink(missing_ok=True)  # of engines that are gone
    except OSError as error:
        raise UserError(f"rollout.server.urls_file: {urls_file}: {error.strerror}") from None
    key = server.api_key_file or shared_key(key_beside(urls_file))
    started_here = dataclasses.replace(started_here, api_key_file=key)
    model = hf_folder(config.model.hf) / "config.json"
    if not _await_file(model, server.start_timeout_s, "model.hf", stop):
        return
    log_dir = config.run_dir / "logs" / f"serve_{number}"
    starter = Starter(started_here, sglang_of(config), config.model.hf, log_dir, _address(nodes))
    say(starter.what_happens())
    with Fleet(starter) as fleet:
        try:
            if not fleet.await_started(lambda: _over(stop)):
                return
        except ServerError as error:
            raise RunStopped(f"{socket.gethostname()}: {error}") from None
        urls = [engine.url for engine in fleet.engines]
        _publish(urls_file, urls, number, nodes, server.start_timeout_s, stop)
        say(f"serving on {', '.join(urls)}; the key is in {key}")
        while not _over(stop):
            if fleet.exhausted():
                raise RunStopped(
                    f"{socket.gethostname()}: no engine is left and "
                    f"rollout.server.max_restarts={server.max_restarts} are used up; see {log_dir}"
                )
            time.sleep(FLEET_POLL_S)


def _over(stop: StopRequest) -> bool:
    """Whether to end now that a stop was asked for.

    Slurm sends a signal to every process of a job that is to end.  The trainer then saves, and
    needs samples to come to the end of its step; the batch script ends us afterwards.
    """
    return stop.received is not None and not environment.in_step()


def _address(nodes: int) -> str:
    """Where engines listen: on several nodes at this one's own address."""
    return "127.0.0.1" if nodes == 1 and not _in_het_job() else own_address()


def _in_het_job() -> bool:
    return "SLURM_HET_SIZE" in os.environ


def _publish(
    file: Path, urls: list[str], number: int, nodes: int, timeout_s: float, stop: StopRequest
) -> None:
    """Task 0 writes the list of all nodes' addresses when the last of them is there."""
    parts = [file.with_name(f"{file.name}.{n}") for n in range(nodes)]
    replace_text(parts[number], "\n".join(urls) + "\n")
    if number > 0:
        return
    for part in parts:
        if not _await_file(part, timeout_s, "rollout.server.urls_file", stop):
            return
    replace_text(file, "".join(part.read_text() for part in parts))
    for part in parts:
        part.unlink()


def _await_file(file: Path, timeout_s: float, key: str, stop: StopRequest) -> bool:
    """Whether it is there; False also if a stop was asked for meanwhile."""
    deadline = time.monotonic() + timeout_s
    while not file.exists():
        if _over(stop):
            return False
        if time.monotonic() > deadline:
            raise UserError(f"{key}: {file} did not appear within {timeout_s:g} s")
        time.sleep(FLEET_POLL_S)
    return True
