"""Look whether this node or allocation can train.

Checks versions, GPUs, network, memory, ports and shared folders, and says what to do about each
finding.  Below srun or torchrun all processes are looked at together.  Exit code 1: a problem was
found.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from megatron_gpc.commands.arguments import number
from megatron_gpc.config.file import load
from megatron_gpc.errors import UserError
from megatron_gpc.run.imports import many_imports


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", type=Path, help="YAML file to hold the nodes against")
    parser.add_argument(
        "overrides", nargs="*", default=[], metavar="key=value", help="replace a key of it"
    )
    parser.add_argument(
        "--shared",
        type=Path,
        action="append",
        default=[],
        metavar="DIR",
        help="folder that all nodes must share; may be given again",
    )
    parser.add_argument(
        "--port",
        type=number(int, 1, 65535),
        action="append",
        default=[],
        dest="ports",
        metavar="PORT",
        help="port that must be free on every node; may be given again",
    )
    parser.add_argument(
        "--sglang",
        type=Path,
        metavar="PYTHON",
        help="interpreter of SGLang's environment (default: the configuration's)",
    )
    parser.add_argument(
        "--timeout",
        type=number(float, 0.1, 1e6),
        default=120.0,
        metavar="S",
        help="how long processes wait for each other (%(default)g s)",
    )


def run(arguments: argparse.Namespace) -> int:
    if arguments.overrides and arguments.config is None:
        raise UserError("key=value replaces a key of a configuration: name it with --config")
    config = None
    sglang_python = arguments.sglang
    if arguments.config is not None:
        config = load(arguments.config, arguments.overrides)
        if sglang_python is None and config.rollout.server.kind == "sglang":
            sglang_python = config.sglang.python or Path(sys.executable)
    with many_imports():
        from megatron_gpc.doctor.run import examine

    return examine(
        config,
        shared=arguments.shared,
        ports=arguments.ports,
        sglang_python=sglang_python,
        timeout_s=arguments.timeout,
    )
