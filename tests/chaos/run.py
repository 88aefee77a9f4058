"""A short training that is started again and again, always by the same command."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

import psutil
from commands import CONFIG, launch, pids_using, rank_process
from rollout_models import build_model

from megatron_gpc.run.child import die_with

RANKS = 2
PROMPTS_PER_STEP = 4
KEPT = 3
"""Checkpoints."""
BEGIN_TIMEOUT_S = 120.0
"""How long a start may take until its first step, and a step until the next [s]."""
END_TIMEOUT_S = 90.0
"""How long a run that cannot go on may take to end [s]."""
LEFT_TIMEOUT_S = 20.0
"""How long its processes may outlive it [s]."""
POLL_S = 0.005

REWARD = '''def reward(text: str, label: str) -> float:
    """The share of odd characters: random weights get rewards that differ, and a gradient."""
    return sum(ord(char) % 2 for char in text) / max(len(text), 1)
'''


def make_task(folder: Path) -> Path:
    """A tiny random model, prompts and a reward in a new folder."""
    build_model(folder, seed=0)
    lines = (f'{{"prompt": "{number}=", "label": ""}}\n' for number in range(64))
    (folder / "prompts.jsonl").write_text("".join(lines))
    (folder / "reward.py").write_text(REWARD)
    return folder


def arguments(task: Path, run_dir: Path, steps: int) -> list[str]:
    """Of `megatron-gpc`, for a run of two ranks and one engine that keeps all it makes."""
    return [
        *("train", str(CONFIG), f"run_dir={run_dir}", f"model.hf={task}", "plots=false"),
        *(f"data.prompts={task}/prompts.jsonl", f"data.verifier={task}/reward.py:reward"),
        *(f"eval.prompts={task}/prompts.jsonl", "eval.samples=1", "eval.every=10"),
        *("eval.max_response_tokens=4", "rollout.max_response_tokens=6", "rollout.group_size=4"),
        *(f"rollout.prompts_per_step={PROMPTS_PER_STEP}", "rollout.save_samples=true"),
        *("rollout.server.probe_tokens=8", "rollout.server.max_restarts=1000"),
        *("parallel.tp=1", "parallel.pp=1", f"parallel.dp={RANKS}", f"train.steps={steps}"),
        *("train.mini_batches=2", "train.epochs=1", "train.micro_batch_size=16"),
        *("clip.schedule=od", "optim.lr=1e-3", "log.sinks=jsonl"),
        *("checkpoint.every=2", f"checkpoint.keep={KEPT}"),
    ]


class Run:
    """A run's folder and the process that trains in it, if there is one.

    Args:
        command: arguments of `megatron-gpc`.
        folder: of the run.
        log: for all that is said; on a disk that is never full.
        environment: variables beside this process's.
    """

    def __init__(
        self,
        command: Sequence[str],
        folder: Path,
        log: Path,
        environment: Mapping[str, str] | None = None,
    ):
        self.command, self.folder, self.log = command, folder, log
        self.environment = {**os.environ, **(environment or {})}
        self.process: subprocess.Popen[bytes] | None = None
        self._said_before = 0
        self._metrics_before: int | None = None

    # ---- life ----

    def start(self, *overrides: str) -> None:
        """Begin, or go on; the run ends when this process does."""
        file = self.folder / "metrics.jsonl"
        self._metrics_before = file.stat().st_ino if file.exists() else None
        with self.log.open("a") as output:
            self._said_before = output.tell()
            self.process = launch(
                [*self.command, *overrides],
                stdout=output,
                stderr=output,
                env=self.environment,
                preexec_fn=partial(die_with, os.getpid()),
            )

    @property
    def code(self) -> int | None:
        """Exit code; None while it runs."""
        assert self.process is not None
        return self.process.poll()

    @property
    def running(self) -> bool:
        return self.process is not None and self.process.poll() is None

    def kill(self) -> None:
        """Make sure that it has ended."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()

    def to_the_end(self) -> None:
        """Let it come to its end, undisturbed from here on.

        Raises:
            AssertionError: it did not.
        """
        if not self.running:
            self.start()
        assert self.process is not None
        code = self.process.wait(60 + 20 * self.steps_asked)
        assert code == 0, f"exit code {code}; {self.end_of_log()}"

    @property
    def steps_asked(self) -> int:
        return int(next(word for word in self.command if word.startswith("train.steps="))[12:])

    # ---- what it does ----

    def step(self) -> int:
        """The last step that was logged; a line that is half written does not count."""
        try:
            return (self.folder / "metrics.jsonl").read_text().count("\n")
        except FileNotFoundError:
            return 0

    def trains(self) -> bool:
        """Whether this start has come to its loop: it has made metrics.jsonl, or made it anew."""
        try:
            return (self.folder / "metrics.jsonl").stat().st_ino != self._metrics_before
        except FileNotFoundError:
            return False

    def wait_for(self, happened: Callable[[], bool], timeout_s: float = BEGIN_TIMEOUT_S) -> bool:
        """Wait for it; False if the run came to its end before.

        Raises:
            AssertionError: the run failed, or nothing happened in time.
        """
        deadline = time.monotonic() + timeout_s
        while not happened():
            if not self.running:
                assert self.code == 0, f"it ended by itself ({self.code}); {self.end_of_log()}"
                return False
            assert time.monotonic() < deadline, f"nothing for {timeout_s:g} s; {self.end_of_log()}"
            time.sleep(POLL_S)
        return True

    def goes_on(self, beyond: int | None = None) -> bool:
        """Wait for the next step; False if the run came to its end instead."""
        step = self.step() if beyond is None else beyond
        return self.wait_for(lambda: self.step() > step)

    def await_end(self) -> int:
        """Its exit code; and none of its processes is left.

        Raises:
            AssertionError: it, or one of them, does not end.
        """
        assert self.process is not None
        try:
            code = self.process.wait(END_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"it neither goes on nor ends; {self.end_of_log()}") from None
        deadline = time.monotonic() + LEFT_TIMEOUT_S
        while left := pids_using(self.folder):
            assert time.monotonic() < deadline, f"processes outlive the run: {left}"
            time.sleep(POLL_S)
        return code

    # ---- what it says ----

    def said(self) -> str:
        """Of this start."""
        with self.log.open(errors="replace") as log:
            log.seek(self._said_before)
            return log.read()

    def last_words(self) -> str:
        """From the last line of the program's own on."""
        return self.said().rpartition("megatron-gpc: ")[2]

    def end_of_log(self) -> str:
        lines = self.log.read_text(errors="replace").splitlines()
        return f"the end of {self.log}:\n" + "\n".join(lines[-40:])

    # ---- its processes ----

    def launcher(self) -> psutil.Process | None:
        return psutil.Process(self.process.pid) if self.process and self.running else None

    def rank(self, number: int) -> psutil.Process | None:
        launcher = self.launcher()
        return launcher and rank_process(launcher.pid, number)

    def engine(self) -> psutil.Process | None:
        """The rollout server that the run has started."""
        launcher = self.launcher()
        for process in launcher.children(recursive=True) if launcher else ():
            try:
                if "megatron_gpc.server" in process.cmdline():
                    return process
            except psutil.NoSuchProcess:
                continue  # it ended while we looked
        return None

    def signal(self, who: Callable[[], psutil.Process | None], number: signal.Signals) -> bool:
        """Send it to one of the processes, which may have yet to start; False if the run came to
        its end before."""
        found: list[psutil.Process] = []

        def sent() -> bool:
            try:
                if (process := who()) is None:
                    return False
                process.send_signal(number)
            except psutil.NoSuchProcess:
                return False
            found.append(process)
            return True

        return self.wait_for(sent) and bool(found)
