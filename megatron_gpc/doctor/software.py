"""Versions, and whether they fit together."""

from __future__ import annotations

import ctypes
import importlib.metadata
import importlib.util
import platform
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from megatron_gpc.doctor.finding import Finding
from megatron_gpc.errors import UserError
from megatron_gpc.run.files import parse_json

SGLANG_TIMEOUT_S = 60.0
"""How long the interpreter of SGLang's environment may take."""
_PINNED = ("torch", "megatron-core", "transformers")
_NCCL = ("nvidia-nccl-cu13", "nvidia-nccl-cu12")
_ASK = """
import importlib.metadata as m, json, re
found = {(d.metadata["Name"] or "").lower(): d for d in m.distributions()}
said = {name: d.version for name, d in found.items() if name in ("sglang", "torch", "transformers",
        "transformer-engine", "nvidia-nccl-cu13", "nvidia-nccl-cu12")}
file = found["torch"].locate_file("torch/version.py") if "torch" in found else None
if file is not None and file.exists():
    cuda = re.search(r"^cuda\\b.*= *'(.+)'", file.read_text(), re.M)
    said["CUDA"] = cuda[1] if cuda else "none"
print(json.dumps(said))
"""


def software(sglang_python: Path | None, broadcast: bool = False) -> list[Finding]:
    """Every finding about versions.

    Args:
        sglang_python: interpreter of SGLang's environment; None: SGLang is not asked for.
        broadcast: whether weights are to reach SGLang over NCCL (sync=distributed).
    """
    found = [Finding("python", "ok", platform.python_version(), same=True)]
    found += [_pinned(name) for name in _PINNED]
    found += [_cuda(), _transformer_engine(), _apex()]
    if sglang_python is not None:
        sglang, versions = _sglang(sglang_python)
        found += [sglang, *_nccl(versions, broadcast)]
    return found


def version_of(name: str) -> str | None:
    """Version of an installed distribution; None if it is not installed."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def driver_cuda() -> tuple[int, int] | None:
    """The newest CUDA that the NVIDIA driver serves; None without a driver."""
    try:
        library = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    number = ctypes.c_int()
    if library.cuDriverGetVersion(ctypes.byref(number)):
        return None
    return number.value // 1000, number.value % 1000 // 10


def _pinned(name: str) -> Finding:
    found = version_of(name)
    if found is None:
        return Finding(name, "problem", "not installed", "pip install --editable . of this project")
    try:
        requires = importlib.metadata.requires("megatron-gpc") or []
    except importlib.metadata.PackageNotFoundError:
        requires = []
    pin = next((r.partition("==")[2] for r in requires if r.startswith(f"{name}==")), None)
    if pin is not None and found.partition("+")[0] != pin:
        advice = f"tested with {pin}: pip install {name}=={pin}"
        return Finding(name, "note", found, advice, same=True)
    return Finding(name, "ok", found, same=True)


def _cuda() -> Finding:
    """torch's CUDA against the driver's."""
    driver = driver_cuda()
    try:
        import torch
    except (ImportError, OSError) as error:
        return Finding("CUDA", "problem", f"torch cannot be imported: {error}", "reinstall torch")
    built = torch.version.cuda
    if driver is None and built is None:
        said = "none: no NVIDIA driver, torch without CUDA"
        return Finding("CUDA", "note", said, "runs on the CPU, over gloo: right for a laptop")
    if driver is None:
        said = f"torch is built for CUDA {built}, but there is no NVIDIA driver"
        return Finding("CUDA", "note", said, "runs on the CPU; on a GPU node load its driver")
    served = "{}.{}".format(*driver)
    if built is None:
        advice = "install a CUDA build of torch"
        return Finding("CUDA", "problem", f"driver serves {served}, torch has no CUDA", advice)
    if int(built.partition(".")[0]) > driver[0]:
        advice = f"update the driver, or install torch built for CUDA {driver[0]}"
        return Finding("CUDA", "problem", f"torch wants {built}, driver serves {served}", advice)
    if not torch.cuda.is_available():
        advice = "see CUDA_VISIBLE_DEVICES, and ask for GPUs with --gpus-per-node"
        return Finding("CUDA", "problem", "driver and torch fit, but no GPU can be used", advice)
    return Finding("CUDA", "ok", f"torch {built}, driver serves {served}", same=True)


def _transformer_engine() -> Finding:
    found = version_of("transformer-engine")
    if found is None:
        if driver_cuda() is None:
            return Finding("transformer-engine", "ok", "none; it serves GPUs only")
        advice = "docs/gpu.md says how it is installed; without it layers are slower"
        return Finding("transformer-engine", "note", "not installed", advice)
    if driver_cuda() is None:
        return Finding("transformer-engine", "ok", f"{found}, not used without a GPU", same=True)
    try:
        importlib.import_module("transformer_engine.pytorch")
    except (ImportError, OSError) as error:
        advice = "build it against this torch: pip install --no-build-isolation"
        return Finding("transformer-engine", "problem", f"{found}: {error}", advice)
    fitting = _fitting_transformer_engine()
    if fitting and not fitting.contains(found, prereleases=True):
        advice = f"megatron-core says {fitting}: pip install 'megatron-gpc[gpu]'"
        return Finding("transformer-engine", "note", found, advice, same=True)
    return Finding("transformer-engine", "ok", found, same=True)


def _fitting_transformer_engine() -> SpecifierSet | None:
    """The versions that megatron-core says it works with, in one of its extras."""
    try:
        asked = map(Requirement, importlib.metadata.requires("megatron-core") or ())
    except importlib.metadata.PackageNotFoundError:
        return None
    return next((r.specifier for r in asked if r.name == "transformer-engine"), None)


def _apex() -> Finding:
    spec = importlib.util.find_spec("apex")
    if spec is None:
        return Finding("apex", "ok", "none; not required")
    if not any(
        (Path(p) / "multi_tensor_apply").is_dir() for p in spec.submodule_search_locations or ()
    ):
        advice = "pip uninstall apex, and build NVIDIA's from its source"
        return Finding("apex", "problem", "PyPI's apex, which is another project", advice)
    if importlib.util.find_spec("fused_weight_gradient_mlp_cuda") is None:
        advice = "build it with its CUDA extensions, or uninstall it"
        return Finding("apex", "note", "NVIDIA's, without CUDA extensions: not used", advice)
    return Finding("apex", "ok", "NVIDIA's", same=True)


def _sglang(python: Path) -> tuple[Finding, dict[str, str]]:
    """What is said of it, and the versions in its environment."""
    advice = "set sglang.python to the interpreter of an environment with SGLang"
    try:
        done = subprocess.run(
            [str(python), "-c", _ASK], capture_output=True, text=True, timeout=SGLANG_TIMEOUT_S
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return Finding("SGLang", "problem", f"{python}: {error}", advice), {}
    if done.returncode:
        last = done.stderr.strip().splitlines()[-1:]
        return Finding("SGLang", "problem", f"{python}: {''.join(last)}", advice), {}
    try:
        versions = parse_json(done.stdout, str(python))
    except UserError as error:  # it is no Python
        return Finding("SGLang", "problem", str(error), advice), {}
    if "sglang" not in versions:
        return Finding("SGLang", "problem", f"{python}: not installed", advice), versions
    others = ", ".join(f"{n} {v}" for n, v in sorted(versions.items()) if n != "sglang")
    return Finding("SGLang", "ok", f"{versions['sglang']} with {others}", same=True), versions


def _nccl(theirs: Mapping[str, str], broadcast: bool) -> Iterator[Finding]:
    """The trainer's NCCL against SGLang's: two versions refuse to work together."""
    here = {name: version for name in _NCCL if (version := version_of(name))}
    there = {name: theirs[name] for name in _NCCL if name in theirs}
    if not here or not there:
        return
    said = " and ".join(
        ", ".join(f"{name} {version}" for name, version in found.items()) for found in (here, there)
    )
    if {*here.values()} & {*there.values()}:
        yield Finding("NCCL", "ok", said.partition(" and ")[0] + " in both environments", same=True)
        return
    (name, version), *_ = here.items()
    advice = f"sync=distributed needs one: pip install {name}=={version} in SGLang's environment"
    yield Finding("NCCL", "problem" if broadcast else "note", said, advice, same=True)
