"""Live progress of a run: one line in place on a terminal, a line now and then in a log."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Mapping
from datetime import timedelta

import rich.console
from rich.highlighter import ReprHighlighter
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Column
from rich.text import Text

from megatron_gpc.metrics.drawn import CURVE_WIDTH, bar, curve

LINES_A_RUN = 20
"""A log gets so many lines a run at even distances, besides the first and the last step ..."""
LOG_SILENCE_S = 60.0
"""... and one whenever a step ends that long after the last line [s]."""
BAR_WIDTH = 30
"""Most characters of the bar of entropy."""
RATE_STEPS = 20
"""The time left is reckoned from the last so many steps: the first ones are slower."""


class Console:
    """Shows how far a run is; rank 0 has one.

    On a terminal that can move its cursor this changes in place:

        37/100 ━━━━╺━━━━ reward 0.512 entropy 1.234 clip 2.1/3.4 % 812 tok/s 0:03:12 left
                         entropy 0.912 ▁▂▄▅▇██▇▆▅▄ 1.240

    and below it entropy so far, between its lowest and its highest value.

    On a pipe, in a log file or on a dumb terminal it is a line every step up to 20 steps.  A longer
    run gets a line every 5 % of it, whenever a minute has passed since the last one, and always at
    the first and the last step; entropy is the bar at its end.

    `clip` is the share of tokens clipped at the lower / upper bound; `entropy 1.234 -> 1.300` has
    its target, if clip.schedule is `target`.

    Args:
        total_steps: T, steps of the whole run.
        start_step: steps that were finished when this process began.
        output: where to write; None means standard output.
    """

    def __init__(
        self, total_steps: int, start_step: int, output: rich.console.Console | None = None
    ):
        self._output = output or rich.console.Console()
        self._total, self._start = total_steps, start_step
        self._every = max(1, math.ceil((total_steps - start_step) / LINES_A_RUN))
        self._ends = deque([(start_step, time.monotonic())], maxlen=RATE_STEPS + 1)
        self._last_line = time.monotonic()
        self._entropy: list[float] = []
        self._ascii = self._output.options.ascii_only
        self._progress: Progress | None = None
        if self._output.is_terminal and not self._output.is_dumb_terminal:
            self._progress = Progress(
                TextColumn("{task.completed:.0f}/{task.total:.0f}"),
                BarColumn(bar_width=None, table_column=Column(ratio=1)),
                TextColumn(
                    "{task.fields[status]}",
                    highlighter=ReprHighlighter(),
                    table_column=Column(no_wrap=True),
                ),
                console=self._output,
                expand=True,
                refresh_per_second=4,
            )
            self._task = self._progress.add_task(
                "", total=total_steps, completed=start_step, status=""
            )
            self._progress.start()

    def step(self, step: int, values: Mapping[str, float]) -> None:
        """Training step `step` (counted from 1) has ended; `values` are its metrics.

        A metric that is missing is shown as `-`.
        """
        self._ends.append((step, time.monotonic()))
        self._entropy.append(values.get("entropy", math.nan))
        status = _status(values, self._seconds_left())
        if self._progress:
            narrow = " ".join(status.split())  # fits into 80 columns, bar included
            self._progress.update(self._task, completed=step, status=f"{narrow}\n{self._curve()}")
        elif self._is_due(step):
            self._last_line = time.monotonic()
            width = len(str(self._total))
            line = f"step {step:{width}}/{self._total}  {status}  {self._bar()}"
            self._print(Text(line.rstrip()))

    def warn(self, text: str) -> None:
        """A line that stays and stands out."""
        self._print(Text.assemble(("warning: ", "bold yellow"), text))

    def close(self) -> None:
        """Leave the progress line as it is and give the terminal back; twice does no harm."""
        if self._progress:
            self._progress.stop()

    def _bar(self) -> str:
        """The last entropy, BAR_WIDTH characters long at one and a half times the first."""
        first = next((one for one in self._entropy if one > 0), math.nan)
        return bar(self._entropy[-1] / (1.5 * first), BAR_WIDTH, self._ascii)

    def _curve(self) -> str:
        known = [one for one in self._entropy if math.isfinite(one)]
        if not known:
            return ""
        drawn = curve(self._entropy, CURVE_WIDTH, self._ascii)
        return f"entropy {min(known):.3f} {drawn} {max(known):.3f}"

    def _print(self, text: Text) -> None:
        self._output.print(text, soft_wrap=True)  # a log's lines are cut by nobody

    def _is_due(self, step: int) -> bool:
        return (
            step in (self._start + 1, self._total)
            or (step - self._start) % self._every == 0
            or time.monotonic() - self._last_line >= LOG_SILENCE_S
        )

    def _seconds_left(self) -> float:
        (first_step, first_time), (last_step, last_time) = self._ends[0], self._ends[-1]
        return (self._total - last_step) * (last_time - first_time) / (last_step - first_step)


def _status(values: Mapping[str, float], seconds_left: float) -> str:
    def show(name: str, form: str, factor: float = 1.0) -> str:
        value = values.get(name, math.nan) * factor
        return format(value, form) if math.isfinite(value) else "-"

    low, high = (show(f"clip_fraction_{side}", ".1f", 100) for side in ("low", "high"))
    target = f" -> {show('entropy_target', '.3f')}" if "entropy_target" in values else ""
    return "  ".join(
        (
            f"reward {show('reward', '.3f'):>6}",
            f"entropy {show('entropy', '.3f'):>6}{target}",
            f"clip {f'{low}/{high} %':>10}",
            f"{show('tokens_per_second', ',.0f'):>7} tok/s",
            f"{timedelta(seconds=round(seconds_left))} left",
        )
    )
