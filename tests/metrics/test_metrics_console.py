from __future__ import annotations

import io
import math
import subprocess
import sys

import pytest
import rich.console

from megatron_gpc.metrics.console import Console
from megatron_gpc.metrics.drawn import bar, curve

VALUES = {
    "reward": 0.5,
    "entropy": 1.25,
    "clip_fraction_low": 0.021,
    "clip_fraction_high": 0.034,
    "tokens_per_second": 1234.5,
}


@pytest.fixture
def clock(monkeypatch):
    """A clock that the test moves."""
    now = [0.0]
    monkeypatch.setattr("megatron_gpc.metrics.console.time.monotonic", lambda: now[0])
    return now


def _log(total, start=0, width=20, seconds=1.0, clock=None):
    """What a run of `total` steps writes into a log."""
    output = io.StringIO()
    console = Console(total, start, rich.console.Console(file=output, width=width))
    for step in range(start + 1, total + 1):
        if clock:
            clock[0] += seconds
        console.step(step, VALUES)
    return output.getvalue().splitlines()


def _step_numbers(lines):
    return [int(line.split()[1].split("/")[0]) for line in lines]


def test_a_pipe_gets_plain_lines():
    program = (
        "from megatron_gpc.metrics.console import Console\n"
        "console = Console(2, 0)\n"
        "console.warn('server [ready] at http://localhost:1')\n"
        f"console.step(1, {VALUES})\n"
        "console.step(2, {})\n"
        "console.close()\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True
    )
    warning, first, last = done.stdout.splitlines()
    assert warning == "warning: server [ready] at http://localhost:1"
    assert (
        first == "step 1/2  reward  0.500  entropy  1.250  clip  2.1/3.4 %    1,234 tok/s  "
        "0:00:00 left  ████████████████████"
    )
    assert (
        last == "step 2/2  reward      -  entropy      -  clip      -/- %        - tok/s  "
        "0:00:00 left"
    )


def test_a_short_run_logs_every_step_on_one_line_each():
    lines = _log(20)
    assert _step_numbers(lines) == list(range(1, 21))
    assert len({len(line) for line in lines}) == 1  # aligned, and never wrapped at the width of 20


def test_a_long_run_logs_the_first_the_last_and_every_twentieth(clock):
    assert _step_numbers(_log(101, clock=clock)) == [1, *range(6, 101, 6), 101]
    assert _step_numbers(_log(400, start=350, clock=clock)) == [351, *range(353, 400, 3), 400]


def test_a_slow_run_logs_at_least_every_minute(clock):
    assert _step_numbers(_log(400, start=300, seconds=61, clock=clock)) == list(range(301, 401))


def test_the_time_left_follows_the_last_steps_and_not_the_slow_first_one(clock):
    output = io.StringIO()
    console = Console(100, 0, rich.console.Console(file=output, width=200))
    for step in range(1, 51):
        clock[0] += 600 if step == 1 else 2
        console.step(step, VALUES)
    lines = output.getvalue().splitlines()
    assert "16:30:00 left  " in lines[0] and "  0:01:40 left  " in lines[-1]


def test_a_target_of_entropy_stands_beside_it():
    output = io.StringIO()
    target = VALUES | {"entropy_target": 1.3}
    Console(1, 0, rich.console.Console(file=output)).step(1, target)
    assert "entropy  1.250 -> 1.300  clip" in output.getvalue()


def test_a_value_that_is_not_finite_is_a_dash():
    output = io.StringIO()
    Console(1, 0, rich.console.Console(file=output)).step(1, VALUES | {"reward": math.nan})
    assert "reward      -  entropy  1.250" in output.getvalue()


def test_a_terminal_gets_one_line_that_changes_in_place():
    output = io.StringIO()
    terminal = rich.console.Console(
        file=output,
        force_terminal=True,
        width=80,
        color_system=None,
        legacy_windows=False,
        _environ={"TERM": "xterm"},
    )
    console = Console(30, 10, terminal)
    for step in range(11, 31):
        console.step(step, VALUES)
    console.warn("a line that stays")
    console.close()
    console.close()
    text = output.getvalue()
    last, below = (line.rstrip() for line in text.rsplit("\x1b[2K", 1)[1].splitlines()[:2])
    assert last.startswith("30/30 ━") and "reward 0.500 entropy 1.250 clip 2.1/3.4 %" in last
    assert below.strip() == f"entropy 1.250 {'▄' * 20} 1.250"
    assert last.endswith("left") and max(len(last), len(below)) <= 80
    assert text.endswith("\x1b[?25h")  # the cursor is back


def test_a_log_shows_entropy_as_a_bar_of_one_and_a_half_times_the_first():
    output = io.StringIO()
    console = Console(4, 0, rich.console.Console(file=output))
    for step, entropy in enumerate((1.0, 1.25, math.nan, 9.0), start=1):
        console.step(step, VALUES | {"entropy": entropy})
    assert [line.split("left")[1].strip() for line in output.getvalue().splitlines()] == [
        20 * "█",
        25 * "█",
        "",
        30 * "█",
    ]


@pytest.mark.parametrize(
    ("share", "drawn"),
    [(0.0, ""), (math.nan, ""), (0.55, "█████▌"), (1.0, 10 * "█"), (7.0, 10 * "█")],
)
def test_a_bar_is_drawn_to_an_eighth_of_a_character(share, drawn):
    assert bar(share, 10) == drawn
    assert bar(share, 10, ascii_only=True).isascii()


@pytest.mark.parametrize(
    ("values", "drawn"),
    [
        ([], ""),
        ([1.0], "▄"),
        ([0.0, 7.0, 3.0], "▁█▄"),
        ([0.0, math.nan, 1.0], "▁ █"),
        ([math.nan], " "),
        ([0.0] * 10 + [1.0] * 6, "▁▁▁▁▁███"),
    ],
)
def test_a_curve_has_eight_heights_between_its_lowest_and_highest_value(values, drawn):
    assert curve(values, 8) == drawn
    assert curve(values, 8, ascii_only=True).isascii()
