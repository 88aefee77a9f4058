"""A plugin for pytest: writes down which tests this command would run, for unit/test_tiers.py.

pytest -p collected --collect-only ...      with the name of the file in the environment, COLLECTED
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest


def _skipped(test: pytest.Item) -> bool:
    """Whether marks already say that it does not run here."""
    return any(
        mark.name == "skip" or (mark.name == "skipif" and any(mark.args))
        for mark in test.iter_markers()
    )


def pytest_collection_finish(session: pytest.Session) -> None:
    for test in session.items:
        assert " at 0x" not in test.nodeid, f"{test.nodeid}: every process names it otherwise"
    names = [test.nodeid.split("[")[0] for test in session.items if not _skipped(test)]
    Path(os.environ["COLLECTED"]).write_text("".join(f"{name}\n" for name in dict.fromkeys(names)))
