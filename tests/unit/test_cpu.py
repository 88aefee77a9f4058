"""Stand-ins for CUDA are inert where it is present; upstream's faults are patched everywhere."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from megatron_gpc.mcore import cpu

CUDA = """
import torch
torch.cuda.is_available = lambda: True  # what a GPU node says
cuda, kind = torch.Tensor.cuda, torch.Tensor.type
from megatron_gpc.mcore import cpu
"""

WITHOUT_TE = f"""{CUDA}
from types import SimpleNamespace
cpu.install()
import megatron.core.tensor_parallel.mappings as mappings
from megatron.core.models import backends
from megatron.core.models.gpt import gpt_layer_specs
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.transformer.moe.moe_utils import RouterGatingLinearFunction
assert torch.Tensor.cuda is cuda and torch.Tensor.type is kind
assert mappings.torch is torch

tokens, weight = torch.randn(5, 4, requires_grad=True), torch.randn(3, 4, requires_grad=True)
scores = RouterGatingLinearFunction.apply(tokens, weight, None, torch.float32)
torch.testing.assert_close(scores, tokens @ weight.T)
scores.sum().backward()
torch.testing.assert_close(tokens.grad, weight.detach().sum(0).expand(5, 4))

config = SimpleNamespace(layernorm_zero_centered_gamma=False, memory_efficient_layer_norm=False,
    normalization="RMSNorm", params_dtype=torch.bfloat16, sequence_parallel=True,
    persist_layer_norm=False)
for norm in (backends.LocalSpecProvider().layer_norm(rms_norm=True), gpt_layer_specs.LNImpl):
    made = norm(config, 8)
    assert type(made) is torch.nn.RMSNorm and made.weight.sequence_parallel
assert DistributedOptimizer.state_dict.__module__ == cpu.mend.__module__
"""

BROKEN_TE = f"""{CUDA}
from megatron_gpc.errors import UserError
try:
    cpu.install()
except UserError as error:
    assert "undefined symbol: _ZN3c10" in str(error) and "uninstall it" in str(error), error
else:
    raise AssertionError("accepted")
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


def run(code: str, path: str = "") -> None:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([path, *sys.path])},
    )
    assert done.returncode == 0, done.stderr


def test_on_a_gpu_without_transformer_engine_only_upstream_faults_are_patched():
    run(WITHOUT_TE)


def test_a_transformer_engine_that_cannot_be_imported_is_refused(tmp_path):
    made = tmp_path / "transformer_engine" / "pytorch" / "__init__.py"
    made.parent.mkdir(parents=True)
    (made.parents[1] / "__init__.py").touch()
    made.write_text('raise OSError("libtransformer_engine.so: undefined symbol: _ZN3c10")')
    run(BROKEN_TE, str(tmp_path))


def test_patches_stay_inside_megatron_and_are_done_once():
    run(ONCE)


@pytest.mark.slow
def test_on_a_gpu_a_fused_function_is_compiled_once_for_all_lengths():
    from torch._dynamo.testing import CompileCounter

    counter = CompileCounter()
    with cpu._compilation(wanted=True):
        fused = torch.compile(lambda x: torch.nn.functional.silu(x) * x, backend=counter)
    for length in (2, 300, 7, 8192, 16):
        fused(torch.ones(length, 1, 8))
    assert counter.frame_count == 1


def test_on_a_cpu_nothing_is_compiled():
    with cpu._compilation(wanted=False):
        assert torch.compile(len) is len
