"""Ctrl-C in a terminal: the first lets a run save, the second ends all of it at once.

A terminal that is closed lets it save too.
"""

from __future__ import annotations

import fcntl
import os
import pty
import re
import select
import signal
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
from commands import COMMAND, CONFIG, ROOT, metrics, pids_using
from rollout_models import build_model

from megatron_gpc.mcore.checkpoint.folder import checkpoints
from megatron_gpc.run.stop import INTERRUPTED, SAVED, marker

pytestmark = pytest.mark.timeout(300)
WITHIN_S = 150


class Terminal:
    """`megatron-gpc ARGUMENTS` in the foreground of a terminal of its own."""

    def __init__(self, *arguments: str, command: tuple[str, ...] = COMMAND, quiet: bool = True):
        self._quiet = quiet
        self._master, slave = pty.openpty()
        self.process = subprocess.Popen(
            [*command, *arguments],
            **{"stdin": slave, "stdout": slave, "stderr": slave, "cwd": ROOT},
            start_new_session=True,
            preexec_fn=partial(fcntl.ioctl, 0, termios.TIOCSCTTY, 0),
        )
        os.close(slave)
        self._raw = ""

    @property
    def text(self) -> str:
        """What it has said, without colours and breaks of lines."""
        return " ".join(re.sub(r"\x1b\[[\d;?]*[a-zA-Z]", "", self._raw).split())

    def interrupt(self) -> None:
        """Press Ctrl-C: the kernel sends SIGINT to every process of the foreground group."""
        os.write(self._master, b"\x03")

    def hang_up(self) -> int:
        """Close the terminal; the exit code."""
        master, self._master = self._master, os.open(os.devnull, os.O_RDONLY)
        os.close(master)
        return self.process.wait(WITHIN_S)

    def await_text(self, wanted: str) -> None:
        self.wait_until(lambda: wanted in self.text)

    def wait_until(self, true: Callable[[], bool]) -> None:
        deadline = time.monotonic() + WITHIN_S
        while not true():
            assert self._read() and time.monotonic() < deadline, self.text
        self._read()

    def end(self) -> int:
        """Its exit code; `text` is then all that it said."""
        deadline = time.monotonic() + WITHIN_S
        while self._read():
            assert time.monotonic() < deadline, self.text
        code = self.process.wait(WITHIN_S)
        if self._quiet:
            assert "Traceback" not in self.text and "Interrupt:" not in self.text, self.text
        return code

    def _read(self) -> bool:
        """Take what there is; False once every process has let go of the terminal."""
        if select.select([self._master], [], [], 0.05)[0]:
            try:
                self._raw += os.read(self._master, 65536).decode(errors="replace")
            except OSError:  # EIO: nobody has it open any more
                return False
        return True

    def close(self) -> None:
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
        os.close(self._master)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    folder = build_model(tmp_path_factory.mktemp("model") / "hf", seed=0)
    (folder / "prompts.jsonl").write_text('{"prompt": "500=", "label": 500}\n' * 4)
    return folder


@pytest.fixture
def run(tmp_path) -> Path:
    return tmp_path / "run"


@pytest.fixture
def terminal(model, run) -> Iterator[Callable[..., Terminal]]:
    """terminal(name, *overrides): starts `megatron-gpc NAME` on a tiny random model."""
    opened = []

    def start(name: str, *overrides: str, **options) -> Terminal:
        opened.append(
            Terminal(
                *(name, str(CONFIG), f"run_dir={run}", f"model.hf={model}", "plots=false"),
                *(f"data.prompts={model}/prompts.jsonl", "eval.prompts=null", "parallel.pp=1"),
                *("parallel.tp=1", "rollout.prompts_per_step=4", "train.mini_batches=1"),
                *("train.steps=100000", "checkpoint.every=0", *overrides),
                **options,
            )
        )
        return opened[-1]

    yield start
    for one in opened:
        one.close()
    assert not pids_using(run)


def _steps(run: Path) -> int:
    return len(metrics(run)) if (run / "metrics.jsonl").exists() else 0


def _quiet_server(run: Path) -> bool:
    return "Traceback" not in (run / "logs" / "server.log").read_text()


@pytest.mark.slow
def test_the_first_saves_and_says_so_and_the_same_command_says_where_it_continues(terminal, run):
    first = terminal("train", "parallel.tp=2")
    first.wait_until(lambda: _steps(run) >= 2)
    first.interrupt()
    first.await_text("asked to end: saving at the end of step ")
    assert first.end() == SAVED
    assert "; Ctrl-C again ends at once" in first.text
    assert marker(run).exists()
    (saved,) = checkpoints(run)
    assert _quiet_server(run) and not pids_using(run)
    again = terminal("train", "parallel.tp=2")
    again.await_text(f"resuming from step {_steps(run)} (checkpoints/{saved.name})")
    again.process.send_signal(signal.SIGINT)  # to the launcher alone
    assert again.end() == SAVED
    assert "asked to end: " in again.text and "Ctrl-C again ends at once" in again.text


@pytest.mark.slow
def test_a_terminal_that_is_closed_lets_it_save(terminal, run):
    it = terminal("train", "parallel.tp=2")
    it.wait_until(lambda: _steps(run) >= 2)
    assert it.hang_up() == SAVED
    assert marker(run).exists() and len(checkpoints(run)) == 1
    assert _quiet_server(run) and not list((run / "logs").glob("*.error.json"))


@pytest.mark.slow
def test_while_ranks_start_it_is_answered_at_once_and_nothing_is_begun(terminal, run):
    it = terminal("train", "parallel.tp=2")
    it.await_text("starting 2 of 2 ranks")
    it.interrupt()
    it.await_text("asked to end: the run is still starting, and stops before its next step")
    assert not (run / "metrics.jsonl").exists()
    assert it.end() == SAVED
    assert "stopped after step 0" in it.text and not checkpoints(run)


def test_the_second_ends_everything_at_once(terminal, run):
    it = terminal("train", "parallel.tp=2", "rollout.max_response_tokens=1000")
    it.wait_until(lambda: _steps(run) >= 1)
    it.interrupt()
    it.await_text("Ctrl-C again ends at once")
    it.interrupt()
    begin = time.monotonic()
    assert it.end() == INTERRUPTED
    assert time.monotonic() - begin < 10
    assert "interrupted: ended at once" in it.text
    assert not pids_using(run) and not marker(run).exists()


def test_before_there_are_ranks_it_ends_at_once_and_so_does_what_makes_the_model(
    terminal, run, tmp_path
):
    script = tmp_path / "build.py"
    script.write_text(
        "import subprocess, sys, time\n"
        "subprocess.Popen(['sleep', '987'])\n"
        "print('building', flush=True)\n"
        "time.sleep(987)\n"
    )
    it = terminal("train", f"model.hf={tmp_path}/absent", f"model.build={script}")
    it.await_text("building")
    it.interrupt()
    assert it.end() == INTERRUPTED
    assert f"making the model with {script}" in it.text
    assert it.text.endswith("megatron-gpc: interrupted")


@pytest.mark.slow
def test_an_evaluation_ends_at_once_and_leaves_nothing(terminal, run, model):
    it = terminal("eval", f"eval.prompts={model}/prompts.jsonl", "rollout.max_response_tokens=900")
    it.await_text("held-out samples")
    it.interrupt()
    assert it.end() == INTERRUPTED
    assert it.text.endswith("megatron-gpc: interrupted")
    (left,) = (run.parent / "evaluations").iterdir()
    assert left.name == "logs"


@pytest.mark.slow
def test_engines_for_runs_elsewhere_end_while_they_start_and_while_they_serve(terminal, tmp_path):
    urls = f"rollout.server.urls_file={tmp_path}/urls"
    for moment in ("starting 1 rollout engine", "serving on http"):
        it = terminal("serve", urls)
        it.await_text(moment)
        it.interrupt()
        assert it.end() == INTERRUPTED
        assert "asked to end: the engines end; Ctrl-C again ends at once" in it.text


@pytest.mark.slow
def test_a_rank_that_torchrun_started_saves_too(terminal, run):
    torchrun = (sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=1")
    it = terminal("train", command=(*torchrun, "-m", "megatron_gpc"), quiet=False)
    it.wait_until(lambda: _steps(run) >= 1)
    it.interrupt()
    it.await_text("asked to end: saving at the end of step ")
    it.end()
    assert marker(run).exists() and "everything is saved" in it.text
    assert not pids_using(run)
