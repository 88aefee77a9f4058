"""Imports go one way; MAY_IMPORT says which."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "megatron_gpc"
BASE = {"types", "errors", "config", "run"}
MAY_IMPORT = {  # room -> rooms of megatron_gpc that it may import, besides itself and BASE
    "types": set(),
    "errors": set(),
    "config": set(),
    "run": set(),
    "algo": set(),
    "kernels": set(),
    "rewards": set(),
    "weights": set(),
    "batching": set(),
    "metrics": {"algo"},
    "engines": {"weights"},
    "rollout": {"engines", "rewards", "weights", "metrics"},
    "server": {"engines", "rollout", "weights"},
    "mcore": {"algo", "kernels", "weights", "metrics", "batching"},
    "doctor": {"algo", "engines", "kernels", "mcore", "metrics", "rewards", "rollout", "weights"},
}
"""Rooms that are not here (train, evaluate, commands, cli) stand on top and may import all."""


def imports(file: Path) -> set[str]:
    """Dotted names of everything that a file imports, also inside functions."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def parts() -> list[tuple[str, Path]]:
    return [
        (file.relative_to(PACKAGE).parts[0].removesuffix(".py"), file)
        for file in sorted(PACKAGE.rglob("*.py"))
    ]


@pytest.mark.parametrize("part", sorted(MAY_IMPORT))
def test_a_part_imports_only_what_stands_below_it(part):
    allowed = MAY_IMPORT[part] | BASE | {part}
    files = [file for name, file in parts() if name == part]
    assert files
    for file in files:
        for name in imports(file):
            if name.startswith("megatron_gpc."):
                below = name.split(".")[1]
                is_symbol = (
                    not (PACKAGE / below).is_dir() and not (PACKAGE / f"{below}.py").exists()
                )
                assert is_symbol or below in allowed, f"{file} imports {name}"


def test_only_mcore_imports_megatron():
    for part, file in parts():
        if part != "mcore":
            assert not {n for n in imports(file) if n.split(".")[0] == "megatron"}, file


def test_config_types_and_the_command_line_import_no_torch():
    code = (
        "import sys; import megatron_gpc.config, megatron_gpc.types, megatron_gpc.cli, "
        "megatron_gpc.config.layout, megatron_gpc.config.parts; sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0
