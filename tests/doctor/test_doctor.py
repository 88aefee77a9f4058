"""`megatron-gpc doctor` on this machine: alone, with two ranks, and with what goes wrong."""

from __future__ import annotations

import ctypes
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from commands import COMMAND, ROOT, command_line
from tiny import run_config

from megatron_gpc.doctor.finding import Finding
from megatron_gpc.doctor.meeting import Rendezvous
from megatron_gpc.doctor.report import last_words, with_differences
from megatron_gpc.doctor.software import software
from megatron_gpc.errors import UserError
from megatron_gpc.run.network import free_port


def start(rank: int, world: int, port: int, *arguments: str) -> subprocess.Popen[str]:
    there = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
    return subprocess.Popen(
        [*COMMAND, "doctor", *arguments],
        cwd=ROOT,
        env={**os.environ, **there, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.fixture
def packages(tmp_path, monkeypatch) -> Iterator[Path]:
    """A folder whose packages can be imported; what was imported from it is forgotten."""
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path
    for name, module in list(sys.modules.items()):
        if str(getattr(module, "__file__", "")).startswith(f"{tmp_path}/"):
            del sys.modules[name]


@pytest.fixture
def busy_port() -> Iterator[int]:
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        yield taken.getsockname()[1]


def test_alone_it_says_what_is_wrong_and_what_to_do(tmp_path, busy_port):
    missing = tmp_path / "nowhere"
    run_config(tmp_path, tmp_path / "model")
    done = command_line(
        *("doctor", "--config", str(tmp_path / "config.yaml"), "seed=1"),
        *("--shared", str(tmp_path), "--shared", str(missing), "--port", str(busy_port)),
    )
    assert done.returncode == 1, done.stderr
    row = {line.split("│")[1].strip(): line for line in done.stdout.splitlines() if "│" in line}
    assert "Address already in use" in row[f"port {busy_port}"]
    assert "not there" in row[f"folder {missing}"]
    assert "written and seen" in row[f"folder {tmp_path}"]
    assert "model.hf" in row["configuration"] and "is not there" in row["configuration"]
    assert "ok" in row["torch"] and "ok" in row["python"]
    assert not list(tmp_path.glob(".canary*"))


def test_two_ranks_meet_share_a_folder_and_add_up(tmp_path):
    port = free_port()
    ranks = [start(n, 2, port, "--shared", str(tmp_path), "--timeout", "120") for n in (0, 1)]
    said = [rank.communicate(timeout=280)[0] for rank in ranks]
    assert "2 ranks over gloo" in said[0], said
    assert "written and seen" in said[0]
    verdict = 0 if "no problem found" in said[0] else 1  # this machine may have one
    assert {rank.returncode for rank in ranks} == {verdict}
    assert "doctor:" not in said[1], "rank 0 alone has the word"
    assert not list(tmp_path.iterdir())


def test_a_rank_that_never_comes_is_named_in_time():
    begin = time.monotonic()
    rank = start(0, 2, free_port(), "--timeout", "2")
    said = rank.communicate(timeout=150)[0]
    assert rank.returncode == 1
    assert "rank 1" in said and "did not come within 2 s" in said
    assert time.monotonic() - begin < 120


def test_a_meeting_place_that_is_taken_is_said(busy_port):
    rank = start(0, 2, busy_port, "--timeout", "5")
    said = rank.communicate(timeout=150)[0]
    assert rank.returncode == 1
    assert "rendezvous" in said and "another program has the port" in said


def test_several_processes_without_a_meeting_place_are_bad_use(monkeypatch):
    for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "2")
    monkeypatch.setenv("SLURM_PROCID", "1")
    monkeypatch.setenv("SLURM_LOCALID", "0")
    monkeypatch.setenv("SLURM_JOB_ID", "1301")
    monkeypatch.setenv("SLURM_STEP_NODELIST", "node[3-4]")
    with pytest.raises(UserError, match="MASTER_ADDR"):  # no Slurm here that knows the names
        monkeypatch.setenv("PATH", "")
        Rendezvous.from_environment()
    monkeypatch.setenv("MASTER_ADDR", "n1")
    monkeypatch.setenv("MASTER_PORT", "20000")
    assert Rendezvous.from_environment() == Rendezvous(1, 2, 0, "n1", 20000)


def test_a_bad_node_and_one_that_differs_are_named():
    told = [(f"n{i}", Finding("torch", "ok", "2.13.0", same=True)) for i in (1, 2, 3)]
    assert last_words(with_differences(told)) == "no problem found"
    told[2] = ("n3", Finding("torch", "ok", "2.12.0", same=True))
    told.append(("n2", Finding("GPUs", "problem", "7 are seen", "leave it out")))
    assert "--exclude=n2,n3" in last_words(with_differences(told))


def install(name: str, version: str, folder: Path) -> None:
    """A distribution without content."""
    info = folder / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")


@pytest.mark.parametrize(
    ("theirs", "broadcast", "status"),
    [("2.30.7", True, "problem"), ("2.30.7", False, "note"), ("2.29.7", True, "ok")],
)
def test_nccl_is_held_to_that_of_sglangs_environment(
    tmp_path, monkeypatch, theirs, broadcast, status
):
    install("nvidia-nccl-cu13", "2.29.7", tmp_path / "here")
    monkeypatch.syspath_prepend(tmp_path / "here")
    there = tmp_path / "there"
    install("sglang", "0.5.23", there)
    install("torch", "2.14.1", there)
    install("nvidia-nccl-cu13", theirs, there)
    (there / "torch").mkdir()
    (there / "torch" / "version.py").write_text("cuda: Optional[str] = '13.0'\n")
    python = tmp_path / "python"  # as an environment's: with packages of its own
    python.write_text(f'#!/bin/sh\nPYTHONPATH={there} exec {sys.executable} -S "$@"\n')
    python.chmod(0o755)
    found = {finding.check: finding for finding in software(python, broadcast)}
    assert found["SGLang"].found.startswith("0.5.23 with CUDA 13.0, nvidia-nccl-cu13 ")
    assert found["NCCL"].status == status
    if status != "ok":
        assert found["NCCL"].found == f"nvidia-nccl-cu13 2.29.7 and nvidia-nccl-cu13 {theirs}"
        assert "pip install nvidia-nccl-cu13==2.29.7" in found["NCCL"].advice


class Driver:
    """NVIDIA's libcuda, of CUDA 13.0."""

    def cuDriverGetVersion(self, number: Any) -> int:
        number._obj.value = 13000
        return 0


def test_a_transformer_engine_outside_megatron_cores_range_is_told(packages, monkeypatch):
    package = packages / "transformer_engine" / "pytorch"
    package.mkdir(parents=True)
    for folder in (package, package.parent):
        (folder / "__init__.py").touch()
    monkeypatch.setattr(ctypes, "CDLL", lambda name: Driver())
    for version, status in (("2.11.0", "ok"), ("2.20.2", "note")):
        install("transformer-engine", version, packages)
        found = {finding.check: finding for finding in software(None)}["transformer-engine"]
        assert (found.status, found.found) == (status, version)
        shutil.rmtree(packages / f"transformer_engine-{version}.dist-info")
    assert "<2.12" in found.advice


def test_another_projects_apex_and_an_sglang_that_is_not_there_are_told(packages):
    (packages / "apex").mkdir()
    (packages / "apex" / "__init__.py").write_text("")
    found = {finding.check: finding for finding in software(packages / "python")}
    assert found["apex"].status == "problem" and "another project" in found["apex"].found
    assert found["SGLang"].status == "problem" and found["SGLang"].advice
