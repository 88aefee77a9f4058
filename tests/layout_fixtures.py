"""The problems that layouts are compared on, made once a session; for conftest files."""

from __future__ import annotations

from pathlib import Path

import pytest
from problems import MODELS, Problem, Reference, make_problem


@pytest.fixture(scope="session")
def problems(tmp_path_factory) -> dict[str, Problem]:
    return {name: make_problem(name, tmp_path_factory.mktemp(name)) for name in MODELS}


@pytest.fixture(scope="session")
def references(problems: dict[str, Problem], tmp_path_factory) -> dict[str, Reference]:
    """Of mini-batches that hold every sample."""
    folder: Path = tmp_path_factory.mktemp("references")
    return {name: problem.reference(folder) for name, problem in problems.items()}
