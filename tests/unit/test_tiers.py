"""No test is forgotten: what CI's commands collect is what stands in the test files."""

from __future__ import annotations

import ast
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from commands import ROOT

ELSEWHERE = {
    "tests/weights/test_weights_mbridge.py": "no command of CI installs mbridge",
}
"""Files that no command of CI collects, and why."""


def commands_of_ci() -> list[str]:
    """The pytest commands behind the `make` lines of .ci/run, as a shell would run them."""
    targets = re.findall(r"^make (\S+)$", (ROOT / ".ci" / "run").read_text(), re.MULTILINE)
    made = subprocess.run(
        ["make", "--dry-run", "--always-make", *targets],
        capture_output=True, text=True, check=True, cwd=ROOT, timeout=60,
    )  # fmt: skip
    lines = made.stdout.replace("\\\n", " ").splitlines()
    return [line for line in lines if "-m pytest" in line]


def merged(commands: Sequence[str]) -> list[str]:
    """The same tests in fewer commands: what one runs with `-m X` and another with `-m "not X"`
    are all that it would run without."""
    marks: dict[str, set[str]] = {}
    for command in commands:
        found = re.fullmatch(r"""(.* -m pytest\b.*) -m ([\w]+|"[\w ]+"|'[\w ]+')""", command)
        rest, mark = (found[1], found[2].strip("\"'")) if found else (command, "")
        marks.setdefault(rest, set()).add(mark)
    return [
        f"{rest} -m {shlex.quote(mark)}" if mark else rest
        for rest, given in marks.items()
        for mark in ({""} if any(f"not {mark}" in given for mark in given) else given)
    ]


def collected(command: str, into: Path) -> set[str]:
    """`tests/file.py::test_name` of everything that a command would run, skipped tests left out."""
    words = shlex.split(command)
    python = words.index(".venv/bin/python")
    environment = {name: v for name, v in os.environ.items() if not name.startswith("PYTEST")}
    environment.update(word.split("=", 1) for word in words[:python])
    environment.update(COLLECTED=str(into), PYTHONPATH=f"{ROOT}:{ROOT / 'tests'}")
    more = ("--collect-only", "-q", "-p", "collected", "-p", "no:cacheprovider")
    done = subprocess.run(
        [sys.executable, *words[python + 1 :], *more],
        capture_output=True, text=True, env=environment, cwd=ROOT, timeout=200,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return set(into.read_text().splitlines())


def python_files() -> list[str]:
    """Under version control, or about to be."""
    named = subprocess.run(
        ["git", "-c", "safe.directory=*", "ls-files", "--cached", "--others", "--exclude-standard"],
        capture_output=True, text=True, check=True, cwd=ROOT, timeout=60,
    )  # fmt: skip
    return [n for n in named.stdout.splitlines() if n.endswith(".py") and (ROOT / n).exists()]


def written_in(file: str) -> Iterator[str]:
    """`file::test_name` of every test function that is written in a file."""
    for node in ast.parse((ROOT / file).read_text()).body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name[:5] == "test_":
            yield f"{file}::{node.name}"
        if isinstance(node, ast.ClassDef) and node.name.startswith("Test"):
            for method in node.body:
                if isinstance(method, ast.FunctionDef) and method.name[:5] == "test_":
                    yield f"{file}::{node.name}::{method.name}"


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="not a checkout")
def test_every_test_is_run_by_a_command_of_ci(tmp_path):
    commands = merged(commands_of_ci())
    assert commands
    run = set().union(*(collected(c, tmp_path / f"{i}") for i, c in enumerate(commands)))
    files = [name for name in python_files() if name not in ELSEWHERE]
    written = {test for name in files for test in written_in(name)}
    written_files = {name for name in files if Path(name).name.startswith("test_")}
    run_files = {test.split("::")[0] for test in run}
    forgotten = sorted(written - run) + sorted(written_files - run_files)
    assert not forgotten, "no command of .ci/run runs these"


def test_only_commands_that_run_all_together_are_merged():
    assert merged(["p -m pytest a -m slow", 'p -m pytest a -m "not slow"']) == ["p -m pytest a"]
    alone = ["p -m pytest a -m slow", "p -m pytest b -m 'not slow'", "p -m pytest c"]
    assert merged(alone) == alone
