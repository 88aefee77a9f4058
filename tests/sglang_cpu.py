"""The real SGLang on a CPU, where `make test-sglang` has installed it."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

from megatron_gpc.engines.process import SGLangServer

PYTHON = os.environ.get("SGLANG_PYTHON")
"""Interpreter of its environment; None where it is not installed."""
SHIM = Path(__file__).parent / "sglang" / "cpu_shim"
ENVIRONMENT = {"PYTHONPATH": str(SHIM), "SGLANG_USE_CPU_ENGINE": "1"}
START_TIMEOUT_S = 600.0
"""How long it may take to start: 20 s on two idle cores, minutes on two that others use."""
ARGS = {
    "device": "cpu",
    "attention_backend": "torch_native",
    "dtype": "float32",
    "max_total_tokens": 4096,
    "mem_fraction_static": 0.1,
    "sleep_on_idle": True,  # or an idle server takes a core
    # With it one token too few is called the old weights' own after an in_place pause: the step in
    # flight at the pause is finished, but labelled after the update.
    "disable_overlap_schedule": True,
}


def server(model: Path, log: Path) -> SGLangServer:
    """One that serves a Hugging Face folder; healthy when this returns."""
    return SGLangServer(
        "sglang.launch_server",
        PYTHON,
        {"model_path": model, **ARGS},
        ENVIRONMENT,
        log,
        START_TIMEOUT_S,
    )


def has_router() -> bool:
    """Whether sglang-router is installed beside it."""
    code = "import importlib.util as u, sys; sys.exit(u.find_spec('sglang_router') is None)"
    return subprocess.run([PYTHON, "-c", code], timeout=60).returncode == 0


def overrides(**args: object) -> list[str]:
    """Of a run whose engines, or router, are this SGLang."""
    return [
        "rollout.server.kind=sglang",
        f"rollout.server.start_timeout_s={START_TIMEOUT_S}",
        f"sglang.python={PYTHON}",
        *(f"sglang.environment.{name}={value}" for name, value in ENVIRONMENT.items()),
        *(f"sglang.args.{name}={value}" for name, value in {**ARGS, **args}.items()),
    ]
