"""What every table of inputs needs, and what became of the inputs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import pytest
from unit.test_preflight import Job

DEEP = "[" * 100_000
DEEP_OBJECT = '{"a":' * 100_000
CONFIG = (
    "run_dir: a\nseed: 0\nmodel: {hf: a}\ntrain: {steps: 3}\n"
    "clip: {schedule: id, phase_split: 0.5}\n"
)
"""What is read of a finished run's."""
Change = Callable[[Job], object]
OUTCOMES: Counter[str] = Counter()


def saying(*overrides: str) -> Change:
    return lambda j: j.overrides.extend(overrides)


def refused(capsys: pytest.CaptureFixture[str], says: str, run: Callable[[], int]) -> None:
    """`run` ends with code 2 and one line that says it; OUTCOMES counts what happens."""
    capsys.readouterr()
    outcome, code = "hang", None
    try:
        code = run()
        outcome = "wrong accept" if code == 0 else "unclear"
        said = capsys.readouterr()
        assert code == 2, (code, said.err)
        assert says in said.err and said.err.count("\n") == 1 and len(said.err) < 2000, said.err
        assert not said.out
        outcome = "refused well"
    except (Exception, SystemExit):
        outcome = outcome if code is not None else "traceback"
        raise
    finally:  # pytest's timeout is no Exception
        OUTCOMES[outcome] += 1
