"""A conversion that is cut short leaves nothing that could be mistaken for a checkpoint."""

from __future__ import annotations

import signal
import time
from pathlib import Path

import pytest
from tiny_models import names
from tool_scripts import call, start

from megatron_gpc.weights.convert import hf_to_megatron

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def converted(large: Path) -> Path:
    hf_to_megatron(large, large.parent / "converted")
    return large.parent / "converted"


def cut_short(signal_number: int, out: Path, *arguments: object) -> int:
    """Start a tool, signal it once it has written some megabytes; its exit code."""
    running = start(*arguments, "--out", out)
    deadline = time.monotonic() + 60
    while sum(f.stat().st_size for f in out.parent.glob(f".{out.name}.partial-*/*")) < 2**24:
        assert running.poll() is None and time.monotonic() < deadline
        time.sleep(0.002)
    assert not out.exists()
    running.send_signal(signal_number)
    _, said = running.communicate(timeout=30)
    assert "Traceback" not in said
    return running.returncode


def test_sigint_and_sigterm_remove_what_was_begun(
    large: Path, converted: Path, tmp_path: Path
) -> None:
    there = ("convert_hf_to_megatron", "--hf", large)
    back = ("convert_megatron_to_hf", "--checkpoint", converted)
    assert cut_short(signal.SIGTERM, tmp_path / "out", *there) == 130
    assert names(tmp_path) == set()
    assert cut_short(signal.SIGINT, tmp_path / "out", *back) == 130
    assert names(tmp_path) == set()


def test_sigkill_leaves_a_hidden_folder_that_no_tool_takes_for_a_checkpoint(
    large: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    there = ("convert_hf_to_megatron", "--hf", large)
    assert cut_short(signal.SIGKILL, tmp_path / "out", *there) == -signal.SIGKILL
    (left,) = tmp_path.iterdir()
    assert left.name.startswith(".out.partial-")
    back = ("convert_megatron_to_hf", "--checkpoint", left, "--out", tmp_path / "back")
    assert call(*back) == 2
    assert "is not a complete distributed checkpoint" in capsys.readouterr().err
    assert call(*there, "--out", tmp_path / "out") == 0, "the same command again just works"
    assert names(tmp_path) == {"out", left.name}
