"""The real SGLang on a CPU, where `make test-sglang` has installed it."""

from __future__ import annotations

import os
from pathlib import Path

PYTHON = os.environ.get("SGLANG_PYTHON")
"""Interpreter of its environment; None where it is not installed."""
SHIM = Path(__file__).parent / "sglang" / "cpu_shim"
ENVIRONMENT = {"PYTHONPATH": str(SHIM), "SGLANG_USE_CPU_ENGINE": "1"}
ARGS = {
    "device": "cpu",
    "attention_backend": "torch_native",
    "dtype": "float32",
    "max_total_tokens": 4096,
    "mem_fraction_static": 0.1,
    # With it one token too few is called the old weights' own after an in_place pause: the step in
    # flight at the pause is finished, but labelled after the update.
    "disable_overlap_schedule": True,
}


def overrides(**args: object) -> list[str]:
    """Of a run whose engines are this SGLang."""
    return [
        "rollout.server.kind=sglang",
        f"sglang.python={PYTHON}",
        *(f"sglang.environment.{name}={value}" for name, value in ENVIRONMENT.items()),
        *(f"sglang.args.{name}={value}" for name, value in {**ARGS, **args}.items()),
    ]
