"""The pictures on README's front page."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_both_are_drawn_once_there_are_runs_to_compare(write_run, tmp_path):
    for name in ("static-0", "static-1", "id-0", "id-1"):
        write_run(name, *name.split("-")[:1], seed=int(name[-1]), steps=4)
    done = subprocess.run(
        [
            *(sys.executable, str(ROOT / "tools" / "front_pictures.py")),
            *("--compare", str(tmp_path), "--out", str(tmp_path / "images")),
        ],
        capture_output=True,
        text=True,
        timeout=100,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stderr
    drawn = sorted(file.name for file in (tmp_path / "images").iterdir())
    assert drawn == ["id_static.png", "method.png"]
    assert all((tmp_path / "images" / name).read_bytes()[1:4] == b"PNG" for name in drawn)
