"""README and docs/ name files and functions that exist."""

from __future__ import annotations

import ast
import re

import pytest
from commands import ROOT

PACKAGE = ROOT / "megatron_gpc"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def _names(file: str) -> set[str]:
    """`f`, `C` and `C.m` of a module's functions, classes and methods."""
    found = set()
    for node in ast.parse((PACKAGE / file).read_text()).body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            found.add(node.name)
        if isinstance(node, ast.ClassDef):
            inner = ast.FunctionDef | ast.AsyncFunctionDef
            found |= {f"{node.name}.{f.name}" for f in node.body if isinstance(f, inner)}
    return found


def test_the_life_of_a_sample_names_functions_where_they_are():
    text = (ROOT / "docs" / "architecture.md").read_text()
    steps = text.partition("## The life of a sample")[2].partition("\n## ")[0]
    assert 12 <= len(re.findall(r"^\d+\. ", steps, re.M)) <= 15
    named = re.findall(r"`([\w.]+)`\s+\(`([\w/]+\.py)`\)", steps)
    assert len(named) > 20
    assert [(name, file) for name, file in named if name not in _names(file)] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files(page):
    links = re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text())
    assert [link for link in links if not (page.parent / link).exists()] == []


def test_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150
