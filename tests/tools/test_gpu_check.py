"""tests/gpu/check.sh runs small without a GPU, so that it does not rot until one is there."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from commands import ROOT


def start(folder, *parts: str, **environment: str) -> subprocess.Popen[str]:
    command = [ROOT / "tests" / "gpu" / "check.sh", folder]
    if parts:
        command = [sys.executable, ROOT / "tests" / "gpu" / "check.py", "--out", folder, *parts]
    search = os.pathsep.join([str(ROOT), str(ROOT / "tests"), *sys.path])
    given = {"PYTHON": sys.executable, "PYTHONPATH": search, **environment}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(command, env={**os.environ, **given}, text=True, **pipes)


def check(folder, *parts: str, **environment: str) -> subprocess.CompletedProcess[str]:
    process = start(folder, *parts, **environment)
    said = process.communicate(timeout=300)
    return subprocess.CompletedProcess(process.args, process.returncode, *said)


@pytest.mark.slow
def test_every_part_comes_to_its_end(tmp_path):
    done = check(tmp_path / "found")
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "found" / "found.json").read_text())
    assert [name for name, result in found.items() if "error" in result] == []
    assert found["machine"]["found"]["torch"] in (tmp_path / "found" / "found.txt").read_text()
    steps = found["small steps"]["found"]
    small = ("replicated", "train.experts=each", "train.experts=grouped")
    assert all(steps[what]["devices"] for what in small)
    assert {path.name for path in (tmp_path / "found").iterdir()} == {"found.json", "found.txt"}


@pytest.mark.slow
def test_a_part_that_fails_is_told_and_costs_no_other(tmp_path):
    broken = tmp_path / "site" / "megatron" / "core" / "__init__.py"
    broken.parent.mkdir(parents=True)
    broken.write_text("raise ImportError('not for this machine')")
    search = os.pathsep.join([str(tmp_path / "site"), str(ROOT), *sys.path])
    done = check(tmp_path / "found", "small steps", "machine", PYTHONPATH=search)
    assert done.returncode == 1
    found = json.loads((tmp_path / "found" / "found.json").read_text())
    assert "not for this machine" in found["small steps"]["error"]
    assert found["machine"]["found"]["gpu"]


@pytest.mark.slow
def test_ctrl_c_ends_the_part_too(tmp_path):
    running = start(tmp_path, "head")
    deadline = time.monotonic() + 120
    while len(of_part := processes_of(tmp_path)) < 2:
        assert time.monotonic() < deadline and running.poll() is None
        time.sleep(0.1)
    running.send_signal(signal.SIGINT)
    _, said = running.communicate(timeout=60)
    assert "stopped; found.json has" in said and "Traceback" not in said
    assert not processes_of(tmp_path), of_part


def processes_of(folder) -> list[str]:
    """Command lines that name the folder."""
    found = []
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            if os.fsencode(folder) in (line := file.read_bytes()):
                found.append(line.replace(b"\0", b" ").decode())
    return found
