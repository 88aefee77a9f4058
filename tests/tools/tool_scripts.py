"""The scripts of tools/, as functions and as processes."""

from __future__ import annotations

import runpy
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest

TOOLS = Path(__file__).parents[2] / "tools"
CARRIED = {  # what a Hugging Face folder may hold besides weights and configuration
    "tokenizer_config.json": '{"a": 1}',
    "merges.txt": "x y",
    "chat_template.jinja": "{{ messages }}",
    "LICENSE": "Apache",
}


def call(name: str, *arguments: object) -> int:
    """The exit code of tools/NAME.py, which runs inside this process."""
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as left:
        patch.setattr(sys, "argv", [name, *map(str, arguments)])
        runpy.run_path(str(TOOLS / f"{name}.py"), run_name="__main__")
    return left.value.code


def start(name: str, *arguments: object) -> subprocess.Popen[str]:
    """tools/NAME.py as a process of its own."""
    return subprocess.Popen(
        [sys.executable, TOOLS / f"{name}.py", *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # Whoever runs the tests in a shell's background made SIGINT ignored, for children too.
        preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
    )
