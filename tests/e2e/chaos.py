"""Disturb a run again and again; it must end exactly as the undisturbed one did.

    make chaos KILLS=30 SEED=0
    PYTHONPATH=tests:. python tests/e2e/chaos.py --kills 30 [--start FOLDER] [key=value ...]

One run is left alone.  Another, of the same configuration, is hit at seeded times, while it starts
and while it trains: SIGKILL to a rank, to the launcher or to the rollout server, a disk that is
full, a byte flipped in the newest checkpoint.  After each, no process of it may be left and the
same command is started again.  At the end `differences` compares what the two have written.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Literal

import psutil
from commands import CONFIG, ROOT, launch, pids_using, rank_process
from compare_runs import differences

from megatron_gpc.mcore.checkpoint.folder import checkpoints, damaged
from megatron_gpc.run.child import die_with_parent

RANKS = 2
PROMPTS_PER_STEP = 8
RUN_TIMEOUT_S = 1200.0
"""For a run that is left alone, and for the last stretch of the disturbed one [s]."""
END_TIMEOUT_S = 120.0
"""How long a run may take to end after it was hit [s]."""
DISK_BYTES = 64 * 2**20
Kind = Literal["rank", "launcher", "server", "disk"]
KILLS: tuple[Kind, ...] = ("rank", "launcher", "server")


@dataclass(frozen=True)
class Event:
    """What happens to a run, once, and when."""

    kind: Kind
    """Who gets SIGKILL; `disk`: nobody, the disk is filled."""
    after: Literal["launch", "begin"]
    """From when on the delay counts: the start of the command, or of its first training step ..."""
    delay_s: float
    steps: int = 0
    """... and then so many steps more."""
    rank: int = 0
    flip: bool = False
    """Whether a byte of the newest checkpoint is flipped once the run has ended; after a later
    event where there is no older checkpoint yet to fall back on."""
    free_bytes: int = 0
    """What is left on the disk when it is filled."""

    def __str__(self) -> str:
        who = f"rank {self.rank}" if self.kind == "rank" else self.kind
        when = (
            f"{self.delay_s:.2f} s after "
            + self.after
            + f" + {self.steps} steps" * bool(self.steps)
        )
        return f"{who:8} {when}" + ", flip" * self.flip


def plan(kills: int, seed: int, disks: bool) -> list[Event]:
    """`kills` kills, evenly over ranks, launcher and server; every 5th with a flipped byte; every
    10th, and the first, after a full disk."""
    draw = Random(f"chaos/{seed}")
    kinds = [KILLS[i % len(KILLS)] for i in range(kills)]
    draw.shuffle(kinds)

    def event(kind: Kind, **more: int) -> Event:
        if kind != "disk" and draw.random() < 1 / 3:
            when = {"after": "launch", "delay_s": draw.uniform(0.0, 6.0)}
        else:
            when = {"after": "begin", "delay_s": draw.random(), "steps": draw.randrange(5)}
        return Event(kind=kind, rank=draw.randrange(RANKS), **when, **more)

    events = []
    for number, kind in enumerate(kinds):
        if disks and number % 10 == 0:
            events.append(event("disk", free_bytes=draw.randrange(4 * 2**20)))
        events.append(event(kind, flip=number % 5 == 4))
    return events


@dataclass
class Chaos:
    """A run that is hit by events.

    Args:
        arguments: arguments(run_dir) of `megatron-gpc`; they are the same at every start.
        say: shown a line for every event.
    """

    arguments: Callable[[Path], list[str]]
    run_dir: Path
    draw: Random
    say: Callable[[str], None]
    flipped: set[int] = field(default_factory=set)
    """Inodes of damaged checkpoint folders that no start has looked at yet."""
    flips_due: int = 0
    outlived: int = 0
    """Killed servers that the run replaced by itself; then the launcher is killed as well."""
    set_aside: int = 0
    """Damaged checkpoints that a start has noticed."""

    def survive(self, events: Sequence[Event]) -> None:
        """Let every event happen, with a start of its own, and then the run come to its end.

        Raises:
            AssertionError: a process was left, the run did not go on, or it ended too early.
        """
        for number, event in enumerate(events, start=1):
            began = time.monotonic()
            ended_in_s = self._hit(event)
            self._nothing_is_left()
            self._collect_damaged()
            self.flips_due += event.flip
            self._flip_byte()
            self.say(
                f"{number:3}/{len(events)}  {event}: at step {self._step()}, ended within "
                f"{ended_in_s:.1f} s, {time.monotonic() - began:.0f} s in all"
            )
        run_to_the_end(self.arguments(self.run_dir), self.run_dir.parent / "disturbed.log")
        self._nothing_is_left()
        self._collect_damaged()
        assert not self.flipped, "a damaged checkpoint was not noticed"

    def _hit(self, event: Event) -> float:
        """Start the command, let the event happen; how long the run took to end [s]."""
        file = self.run_dir / "metrics.jsonl"
        before = file.stat().st_ino if file.exists() else None
        log = self.run_dir.parent / "disturbed.log"
        with log.open("a") as output:
            running = begin(self.arguments(self.run_dir), output)
        try:
            if event.after == "begin":  # the file is made, or made anew, when training begins
                wait_for(
                    lambda: file.exists() and file.stat().st_ino != before, *(300.0, running, log)
                )
                goal = self._step() + event.steps
                wait_for(lambda: self._step() >= goal, *(300.0, running, log))
            time.sleep(event.delay_s)
            if event.kind == "disk":
                hit_at = time.monotonic()
                with full_disk(self.run_dir, event.free_bytes):
                    code = running.wait(END_TIMEOUT_S)
            else:
                target = self._target(event, running, log)
                hit_at = time.monotonic()
                target.send_signal(signal.SIGKILL)
                if event.kind == "server" and self._goes_on(running, target.pid):
                    self.outlived += 1
                    hit_at = time.monotonic()
                    running.send_signal(signal.SIGKILL)
                code = running.wait(END_TIMEOUT_S)
            assert code != 0, f"{event}: the run had come to its end before; it needs more steps"
            return time.monotonic() - hit_at
        finally:
            running.kill()
            running.wait()

    def _goes_on(self, running: subprocess.Popen, killed: int) -> bool:
        """Whether the run starts another server and trains on; it ends where it had not begun."""
        step, deadline = self._step(), time.monotonic() + END_TIMEOUT_S
        while running.poll() is None:
            assert time.monotonic() < deadline, "it neither ends nor goes on without a server"
            server = server_process(running.pid, 0)
            if server is not None and server.pid != killed and self._step() > step:
                return True
            time.sleep(0.01)
        return False

    def _step(self) -> int:
        """The last step that was logged; a line that is half written does not count."""
        file = self.run_dir / "metrics.jsonl"
        return file.read_text().count("\n") if file.exists() else 0

    def _target(self, event: Event, running: subprocess.Popen, log: Path) -> psutil.Process:
        """The process to be killed; early in a start it is waited for."""
        if event.kind == "launcher":
            return psutil.Process(running.pid)
        find = server_process if event.kind == "server" else rank_process
        wait_for(lambda: find(running.pid, event.rank) is not None, 120.0, running, log)
        found = find(running.pid, event.rank)
        assert found is not None
        return found

    def _nothing_is_left(self) -> None:
        deadline = time.monotonic() + 20.0
        while left := pids_using(self.run_dir):
            assert time.monotonic() < deadline, f"processes outlive the run: {left}"
            time.sleep(0.02)

    def _flip_byte(self) -> None:
        """Damage the newest checkpoint if that is due, and there is one before it."""
        found = checkpoints(self.run_dir)
        if not self.flips_due or len(found) < 2 or found[-1].stat().st_ino in self.flipped:
            return
        self.flips_due -= 1
        self.flipped.add(found[-1].stat().st_ino)
        file = self.draw.choice(sorted(found[-1].iterdir()))
        content = bytearray(file.read_bytes())
        content[self.draw.randrange(len(content))] ^= self.draw.randrange(1, 256)
        file.write_bytes(content)

    def _collect_damaged(self) -> None:
        for folder in damaged(self.run_dir):
            assert folder.stat().st_ino in self.flipped, f"{folder} was damaged by the run itself"
            self.flipped.remove(folder.stat().st_ino)
            shutil.rmtree(folder)
            self.set_aside += 1


def begin(arguments: Sequence[str], output: object) -> subprocess.Popen:
    """Start `megatron-gpc ARGUMENTS`; it ends when this process does."""
    return launch(arguments, stdout=output, stderr=output, preexec_fn=die_with_parent)


def run_to_the_end(arguments: Sequence[str], log: Path) -> float:
    """Run the command undisturbed; how long it took [s]."""
    began = time.monotonic()
    with log.open("a") as output:
        running = begin(arguments, output)
    try:
        code = running.wait(RUN_TIMEOUT_S)
    finally:
        running.kill()
        running.wait()
    assert code == 0, f"exit code {code}; {end_of(log)}"
    return time.monotonic() - began


def wait_for(
    happened: Callable[[], bool], timeout_s: float, running: subprocess.Popen, log: Path
) -> None:
    deadline = time.monotonic() + timeout_s
    while not happened():
        assert running.poll() is None, f"it ended by itself; {end_of(log)}"
        assert time.monotonic() < deadline, f"nothing for {timeout_s:g} s; {end_of(log)}"
        time.sleep(0.01)


def end_of(log: Path) -> str:
    return f"the end of {log}:\n" + "\n".join(log.read_text().splitlines()[-40:])


def server_process(launcher: int, _: int) -> psutil.Process | None:
    """The rollout server of a run; None where there is none (yet)."""
    for process in psutil.Process(launcher).children(recursive=True):
        try:
            if "megatron_gpc.server" in process.cmdline():
                return process
        except psutil.NoSuchProcess:
            continue  # it ended while we looked
    return None


@contextmanager
def small_disk(folder: Path) -> Iterator[bool]:
    """A disk of DISK_BYTES at `folder` during the block; False where mounting is not allowed."""
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "chaos", str(folder)]
    mounted = subprocess.run(mount, capture_output=True).returncode == 0
    try:
        yield mounted
    finally:
        if mounted:
            subprocess.run(["umount", "--lazy", str(folder)], check=True)


@contextmanager
def full_disk(run_dir: Path, free_bytes: int) -> Iterator[None]:
    """During the block, no more than `free_bytes` can be written where run_dir is."""
    ballast = run_dir.parent / "ballast"
    with ballast.open("wb") as file:
        free = shutil.disk_usage(run_dir).free
        os.posix_fallocate(file.fileno(), 0, max(1, free - free_bytes))
    try:
        yield
    finally:
        ballast.unlink()


def command(start: Path, steps: int, overrides: Sequence[str]) -> Callable[[Path], list[str]]:
    """command(run_dir): arguments of the run that is disturbed, a short one of the example."""

    def arguments(run_dir: Path) -> list[str]:
        return [
            *("train", str(CONFIG), f"run_dir={run_dir}", f"model.hf={start}"),
            *(f"data.prompts={start}/train.jsonl", f"eval.prompts={start}/heldout.jsonl"),
            *("eval.samples=2", "eval.every=5", "plots=false"),
            *(f"train.steps={steps}", "clip.schedule=od"),
            *("parallel.tp=1", "parallel.pp=1", f"parallel.dp={RANKS}"),
            f"rollout.prompts_per_step={PROMPTS_PER_STEP}",
            "rollout.save_samples=true",
            *("train.mini_batches=2", "train.epochs=2", "train.micro_batch_size=16"),
            *("optim.lr=1e-3", "checkpoint.every=2", "checkpoint.keep=3", *overrides),
        ]

    return arguments


def say_at_once(line: str) -> None:
    print(line, flush=True)


def campaign(
    start: Path,
    folder: Path,
    events: Sequence[Event],
    steps: int,
    seed: int,
    overrides: Sequence[str] = (),
    say: Callable[[str], None] = say_at_once,
) -> list[str]:
    """The undisturbed run, the disturbed one, and their `differences`.

    Args:
        folder: on the disk that `disk` events fill.
    """
    arguments = command(start, steps, overrides)
    alone_s = run_to_the_end(arguments(folder / "undisturbed"), folder / "undisturbed.log")
    say(f"{steps} steps undisturbed: {alone_s:.0f} s")
    began = time.monotonic()
    chaos = Chaos(arguments, folder / "disturbed", Random(f"chaos/{seed}/bytes"), say)
    chaos.survive(events)
    count = Counter(event.kind for event in events)
    say(
        f"survived {sum(count[kind] for kind in KILLS)} kills ("
        + ", ".join(f"{kind} {count[kind]}" for kind in KILLS)
        + f"), {count['disk']} full disks and {chaos.set_aside} damaged checkpoints in "
        f"{time.monotonic() - began:.0f} s"
    )
    return differences(folder / "undisturbed", folder / "disturbed", steps * PROMPTS_PER_STEP)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--start", type=Path, help="example's start, else it is built")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="for both runs")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="chaos-") as name:
        start = given.start or Path(name) / "start"
        if not given.start:
            build = ROOT / "examples" / "arithmetic" / "build.py"
            subprocess.run([sys.executable, build, start], check=True)
        disk = Path(name) / "disk"
        with small_disk(disk) as mounted:
            if not mounted:
                print("no full disks: mounting a tmpfs is not allowed; try as root")
            events = plan(given.kills, given.seed, disks=mounted)
            steps = 5 * len(events) + 5  # more than the events let the run make
            found = campaign(start.resolve(), disk, events, steps, given.seed, given.overrides)
    print("\n".join(found) if found else "the final state is that of the undisturbed run")
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main())
