"""Starting the ranks of a run."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from commands import ROOT, launch
from tiny import run_config

from megatron_gpc import __version__
from megatron_gpc.run.launch import OUTCOME_FD, run_ranks
from megatron_gpc.run.placement import Share


def test_ranks_run_this_package_and_not_one_that_lies_in_the_current_folder(
    tmp_path, monkeypatch, capfd
):
    (tmp_path / "megatron_gpc").mkdir()
    (tmp_path / "megatron_gpc" / "__init__.py").write_text("raise SystemExit(7)")
    monkeypatch.chdir(tmp_path)
    assert run_ranks(["--version"], Share.alone(2), tmp_path / "logs") == 0
    assert capfd.readouterr().out.strip() == __version__
    assert (tmp_path / "logs" / "rank_1.log").read_text().strip() == __version__


ORPHAN = """
import os, time
from megatron_gpc.run.child import die_with
parent = os.getpid()
if os.fork() == 0:
    while os.getppid() == parent:
        time.sleep(0.01)
    die_with(parent)
    print("lives on")
"""


def test_a_child_ends_whose_parent_was_killed_before_the_child_could_ask_to_end_with_it():
    done = subprocess.run([sys.executable, "-c", ORPHAN], capture_output=True, text=True, cwd=ROOT)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


ENDS = """
import os, sys
from megatron_gpc.run.launch import outcome
how, code = sys.argv[1], int(sys.argv[2])
if how == "says" or (how == "rank 1 does not" and os.environ["RANK"] == "0"):
    sys.exit(outcome(code))
if how == "another program":
    os.execv("/bin/true", ["true"])
os._exit(code)
"""


@pytest.mark.parametrize(
    ("how", "code", "ends"),
    [
        *(("says", code, code) for code in (0, 75)),
        *(("os._exit", code, 1) for code in (0, 75)),
        ("another program", 0, 1),
        ("rank 1 does not", 0, 1),
        ("rank 1 does not", 75, 1),
    ],
)
def test_a_rank_of_a_run_that_ends_as_if_it_were_done_has_failed(
    tmp_path, monkeypatch, capfd, how, code, ends
):
    (tmp_path / "rank_that_ends.py").write_text(ENDS)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    logs, words = tmp_path / "logs", [how, str(code)]
    passed_on = (signal.SIGUSR1,)
    assert run_ranks(words, Share.alone(2), logs, "rank_that_ends", passed_on) == ends
    said = capfd.readouterr().err
    line = f"ended with exit code {code} before the run was over: a part of yours or a library"
    assert (line in said) == (ends == 1) and OUTCOME_FD not in said


HALF = """
import os, signal, subprocess, sys, time
from pathlib import Path
stacks = Path(sys.argv[1], "rank_1.stacks")
if os.environ["RANK"] == "0":
    while not stacks.exists():
        time.sleep(0.01)
    sys.exit(1)

def write(*given):
    stacks.write_text("half of")
    wake = f"import time, os; time.sleep(1.5); os.kill({os.getpid()}, 18)"
    subprocess.Popen([sys.executable, "-c", wake])
    os.kill(os.getpid(), signal.SIGSTOP)
    stacks.write_text("half of a stack, and the rest")

signal.signal(signal.SIGUSR2, write)
signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGUSR2})
stacks.touch()
while True:
    time.sleep(1)
"""


def test_a_rank_whose_turn_it_is_not_may_finish_its_stacks(tmp_path, monkeypatch):
    (tmp_path / "rank_that_waits.py").write_text(HALF)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert run_ranks([str(tmp_path)], Share.alone(2), tmp_path, "rank_that_waits") == 1
    assert (tmp_path / "rank_1.stacks").read_text().endswith("the rest")


FULL = """
import os, sys, time
half, code = sys.argv[1], int(sys.argv[2])
main = os.environ["RANK"] == "0"
if main:
    time.sleep(0.3)  # the other has failed before
    print("megatron-gpc: no space", file=sys.stderr)
if half != "nothing":
    with open(os.environ["TORCHELASTIC_ERROR_FILE"], "w") as file:
        file.write(half)
os._exit(code)
"""


@pytest.mark.parametrize("half", ["nothing", "", '{"message": {"mess'])
@pytest.mark.parametrize("code", [1, 2])
def test_the_main_rank_has_the_last_word_where_the_disk_has_no_room_for_an_error(
    tmp_path, monkeypatch, capfd, half, code
):
    (tmp_path / "rank_without_room.py").write_text(FULL)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    words = [half, str(code)]
    assert run_ranks(words, Share.alone(2), tmp_path / "logs", "rank_without_room") == code
    others = [] if code == 2 else ["megatron-gpc: rank 0 failed first: what it said stands above"]
    assert capfd.readouterr().err.splitlines() == ["megatron-gpc: no space", *others]


LAUNCHER = """
import signal, sys
from pathlib import Path
from megatron_gpc.run.launch import run_ranks
from megatron_gpc.run.placement import Share
"""


def start_launcher(folder: Path, code: str) -> subprocess.Popen[bytes]:
    """A launcher in a process of its own, whose ranks' modules lie in the folder."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(folder)])}
    command = [sys.executable, "-c", LAUNCHER + code]
    return subprocess.Popen(command, cwd=folder, env=environment)


SLEEPS = """
import pathlib, sys, time
from megatron_gpc.run.launch import outcome
pathlib.Path("begun").touch()
time.sleep(1.5)
sys.exit(outcome(0))
"""


def test_a_launcher_that_is_stopped_for_a_while_goes_on(tmp_path):
    """As Ctrl-Z and `fg` do; no rank hears of a signal that nobody sent."""
    (tmp_path / "sleeps.py").write_text(SLEEPS)
    launcher = (
        "heard = (signal.SIGUSR1, signal.SIGINT)\n"
        "sys.exit(run_ranks([], Share.alone(1), Path('logs'), 'sleeps', heard))\n"
    )
    with start_launcher(tmp_path, launcher) as process:
        try:
            deadline = time.monotonic() + 60
            while not (tmp_path / "begun").exists():
                assert process.poll() is None and time.monotonic() < deadline
                time.sleep(0.01)
            for _ in range(8):
                process.send_signal(signal.SIGSTOP)
                time.sleep(0.1)
                process.send_signal(signal.SIGCONT)
                time.sleep(0.03)
            assert process.wait(60) == 0
        finally:
            process.kill()


HEARS = """
import pathlib, signal, sys, time
from megatron_gpc.run.launch import outcome
heard = lambda *_: pathlib.Path("heard").touch()
signal.signal(signal.SIGUSR2, heard)
signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGUSR2})
pathlib.Path("begun").touch()
while not pathlib.Path("heard").exists():
    time.sleep(0.01)
sys.exit(outcome(0))
"""


def test_a_request_for_stacks_reaches_the_ranks_also_if_it_comes_to_a_thread(tmp_path):
    (tmp_path / "hears.py").write_text(HEARS)
    launcher = (
        "import threading, time\n"
        "from megatron_gpc.run.stop import held\n"
        "def to_me():\n"
        "    while not Path('begun').exists():\n"
        "        time.sleep(0.01)\n"
        "    signal.pthread_kill(threading.get_ident(), signal.SIGUSR2)\n"
        "    signal.raise_signal(signal.SIGUSR2)\n"
        "    import os; os.kill(os.getpid(), signal.SIGUSR2)\n"
        "signal.signal(signal.SIGUSR2, signal.SIG_IGN)\n"
        "with held((signal.SIGUSR2,)):\n"
        "    threading.Thread(target=to_me, daemon=True).start()\n"
        "    sys.exit(run_ranks([], Share.alone(1), Path('logs'), 'hears', (signal.SIGUSR2,)))\n"
    )
    with start_launcher(tmp_path, launcher) as process:
        try:
            assert process.wait(60) == 0 and (tmp_path / "heard").exists()
        finally:
            process.kill()


WAITS = """
import sys, time
from pathlib import Path
begun = Path(sys.argv[1]).with_name("begun")
begun.touch()
while begun.exists():
    time.sleep(0.01)
sys.exit(3)
"""


def test_no_thread_of_a_launcher_takes_a_request_for_stacks(tmp_path):
    """Imports start threads, and the kernel gives a signal to any that does not hold it back."""
    (tmp_path / "build.py").write_text(WAITS)
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "1+1=", "label": 2}\n')
    run_config(tmp_path, tmp_path / "model")
    words = ["train", str(tmp_path / "config.yaml"), f"model.build={tmp_path}/build.py"]
    process = launch(words, stderr=subprocess.PIPE, text=True)
    try:
        deadline = time.monotonic() + 100
        while not (tmp_path / "begun").exists():
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.02)
        for status in Path(f"/proc/{process.pid}/task").glob("*/status"):
            blocked = re.search(r"^SigBlk:\s*(\w+)", status.read_text(), re.MULTILINE)
            assert int(blocked[1], 16) & 1 << signal.SIGUSR2 - 1, status.read_text()
        process.send_signal(signal.SIGUSR2)
        (tmp_path / "begun").unlink()
        said = process.communicate(timeout=60)[1]
        assert process.returncode == 2 and "failed (exit code 3)" in said
    finally:
        process.kill()
