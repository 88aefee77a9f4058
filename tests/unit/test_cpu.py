"""The patches for the CPU are inert where CUDA is present, and are done once."""

from __future__ import annotations

import subprocess
import sys

INERT = """
import torch
cuda, kind = torch.Tensor.cuda, torch.Tensor.type
torch.cuda.is_available = lambda: True  # what a GPU node says
from megatron_gpc.mcore import cpu
cpu.install()
import megatron.core.tensor_parallel.mappings as mappings
from megatron.core.models import backends
assert torch.Tensor.cuda is cuda and torch.Tensor.type is kind
assert mappings.torch is torch
assert backends.WrappedTorchNorm.__module__.startswith("megatron.core")
"""

ONCE = """
import torch
from megatron_gpc.mcore import cpu
cpu.install()
patched, stand_in = torch.Tensor.cuda, __import__("megatron.core.tensor_parallel.mappings",
    fromlist=["torch"]).torch
assert stand_in is not torch and not torch.cuda.is_available()
assert stand_in.zeros(2, device="cuda").device.type == "cpu"
cpu.install()
assert torch.Tensor.cuda is patched
try:
    torch.zeros(2, device="cuda")
except (RuntimeError, AssertionError):
    pass  # outside megatron.core the real torch is untouched
else:
    raise AssertionError("torch itself was changed")
"""


def run(code: str) -> None:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr


def test_nothing_is_patched_where_cuda_is_present():
    run(INERT)


def test_patches_stay_inside_megatron_and_are_done_once():
    run(ONCE)
