"""Strike a run until it has come to its end, and again, until there were enough faults."""

from __future__ import annotations

import platform
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

from commands import ROOT
from compare_runs import differences

from chaos.run import PROMPTS_PER_STEP, Run, arguments

AHEAD = 3
"""A fault comes at most so many steps later than it could."""
STEP_S = 0.4
"""About what a step takes: the moment within one is drawn from it [s]."""
START_S = 1.5
"""About what a start takes [s]."""


@dataclass(frozen=True)
class Outcome:
    """What became of a run that was hit.

    Args:
        what: the fault, in words.
        ended: whether the run ended, so that the same command had to continue it.
        seconds: until it went on, or had ended.
    """

    what: str
    ended: bool
    seconds: float


class Fault:
    """One way to disturb a run."""

    overrides: tuple[str, ...] = ()
    """Of the configuration of runs that it hits; none that changes a number."""
    deadlines: tuple[str, ...] = ()
    """Of starts that it hits; they are short, and a busy machine may need more for the rest."""
    environment: dict[str, str] = {}
    """Of such a run, beside this process's."""
    rounded: tuple[str, ...] = ()
    """Metrics that may differ by rounding."""
    while_it_starts = False
    """Whether it may also come before the first step."""

    picks_its_moment = False
    """Whether `hit` itself waits for it; it is drawn otherwise."""

    @contextmanager
    def around(self, folder: Path) -> Iterator[Sequence[str]]:
        """What the run needs around it, in a folder of its own; gives further overrides."""
        yield ()

    def hit(self, run: Run, draw: Random) -> Outcome | None:
        """Disturb it and wait until it has gone on or ended; None: it was at its end already.

        Raises:
            AssertionError: it did neither as it should.
        """
        raise NotImplementedError

    def settle(self, run: Run) -> None:
        """Look at what an ended run has left, before it is continued."""


@dataclass
class Campaign:
    """A kind of fault, and what became of the runs that it hit.

    Args:
        kind: its name.
        faults: one after the other.
        task: `make_task`'s folder.
        undisturbed: a finished run of `steps` steps.
        say: is shown a line for every fault.
    """

    kind: str
    faults: Sequence[Fault]
    task: Path
    undisturbed: Run
    draw: Random
    say: Callable[[str], None]
    outcomes: list[Outcome] = field(default_factory=list)
    differences: list[str] = field(default_factory=list)
    runs: int = 0
    seconds: float = 0.0

    def strike(self, count: int, folder: Path) -> None:
        """Let `count` faults happen, as many of each, in as many runs as it takes.

        Raises:
            AssertionError: a run did not survive one.
        """
        began = time.monotonic()
        for number, fault in enumerate(self.faults, start=1):
            goal = count * number // len(self.faults)
            while (missing := goal - len(self.outcomes)) > 0:
                self.runs += 1
                self._one_run(fault, missing, folder / f"{self.kind}-{self.runs}")
        self.seconds = time.monotonic() - began

    def _one_run(self, fault: Fault, most: int, folder: Path) -> None:
        """Hit a run until it has come to its end, or `most` times."""
        folder.mkdir()
        steps = self.undisturbed.steps_asked
        with fault.around(folder) as further:
            command = arguments(self.task, folder / "run", steps)
            command = [*command, *fault.overrides, *further]
            run = Run(command, folder / "run", folder.with_suffix(".log"), fault.environment)
            try:
                while most > 0 and (outcome := self._one_fault(fault, run)):
                    most -= 1
                    self.outcomes.append(outcome)
                    if outcome.ended:
                        fault.settle(run)
                    state = "ended" if outcome.ended else "went on"
                    self.say(
                        f"{self.kind} {len(self.outcomes):3}  {outcome.what}: at step "
                        f"{run.step()}, {state} within {outcome.seconds:.1f} s"
                    )
                if run.code != 0:
                    run.to_the_end()
                run.await_end()
            finally:
                run.kill()
            prompts = steps * PROMPTS_PER_STEP
            self.differences += differences(
                self.undisturbed.folder, run.folder, prompts, fault.rounded
            )

    def _one_fault(self, fault: Fault, run: Run) -> Outcome | None:
        """At a moment that is drawn; None: the run came to its end before."""
        early = False
        if not run.running:
            run.start(*fault.deadlines)
            early = fault.while_it_starts and self.draw.random() < 0.3
        if early:
            time.sleep(self.draw.uniform(0.0, START_S))
            return fault.hit(run, self.draw)
        if not run.wait_for(run.trains):
            return None
        if fault.picks_its_moment:
            return fault.hit(run, self.draw)
        goal = run.step() + self.draw.randrange(AHEAD)
        if not run.wait_for(lambda: run.step() >= goal):
            return None
        time.sleep(self.draw.uniform(0.0, STEP_S))
        return fault.hit(run, self.draw)

    def row(self) -> str:
        """Of the table in docs/reliability.md."""
        ended = [outcome.ended for outcome in self.outcomes]
        worst = {
            state: max((o.seconds for o in self.outcomes if o.ended == state), default=0.0)
            for state in (False, True)
        }
        cells = [
            *(self.kind, len(self.outcomes), ended.count(False), ended.count(True), self.runs),
            *(f"{worst[False]:.1f}", f"{worst[True]:.1f}", f"{self.seconds:.0f}"),
            *(machine(), commit()),
        ]
        return "| " + " | ".join(map(str, cells)) + " |"

    def what_happened(self) -> str:
        counts = Counter(outcome.what for outcome in self.outcomes)
        return ", ".join(f"{what} {count}" for what, count in sorted(counts.items()))


COLUMNS = (
    *("kind", "faults", "went on by itself", "ended, was continued", "runs"),
    *("longest until it went on [s]", "longest until it had ended [s]", "in all [s]"),
    *("machine", "commit"),
)
HEADER = f"| {' | '.join(COLUMNS)} |\n" + "|---" * len(COLUMNS) + "|"


def machine() -> str:
    import psutil

    return f"{psutil.cpu_count()} cores, {psutil.virtual_memory().total / 2**30:.0f} GiB, " + (
        platform.machine()
    )


def commit() -> str:
    asked = ["git", "describe", "--always", "--dirty"]
    done = subprocess.run(asked, capture_output=True, text=True, cwd=ROOT)
    return done.stdout.strip() or "unknown"


def undisturbed(task: Path, folder: Path, steps: int) -> Run:
    """A finished run that nothing happened to."""
    run = Run(arguments(task, folder, steps), folder, folder.with_suffix(".log"))
    try:
        run.to_the_end()
    finally:
        run.kill()
    return run
