"""Start rollout engines for a run elsewhere.

Starts rollout.server.engines engines on this node, or with srun one task a node on several, and
writes their addresses to rollout.server.urls_file.
"""

from __future__ import annotations

import argparse
import signal

from megatron_gpc.commands.arguments import add_configuration as add_arguments
from megatron_gpc.config.file import load
from megatron_gpc.run.imports import many_imports
from megatron_gpc.run.stop import INTERRUPTED, StopRequest

__all__ = ["add_arguments", "run"]


def run(arguments: argparse.Namespace) -> int:
    stop = StopRequest()
    from megatron_gpc.run.launch import STACKS_SIGNAL

    signal.signal(STACKS_SIGNAL, signal.SIG_IGN)  # `job.sh stacks` sends it to all of a job
    with many_imports():
        from megatron_gpc.doctor.preflight import check_serving
        from megatron_gpc.engines.serve import serve

    config = load(arguments.config, arguments.overrides)
    check_serving(config)
    serve(config, stop)
    return INTERRUPTED if stop.received is signal.SIGINT else 0
