"""Says at the end what became of the inputs that cannot be."""

from __future__ import annotations

import sys

import pytest


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    inputs = sys.modules.get("hostile.test_inputs") or sys.modules.get("test_inputs")
    if inputs is not None and inputs.OUTCOMES:
        counted = ", ".join(f"{count} {what}" for what, count in inputs.OUTCOMES.most_common())
        terminalreporter.write_line(f"inputs that cannot be: {counted}")
