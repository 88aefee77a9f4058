"""The entropy study at a reduced size: one seed, one region at a time."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from commands import ROOT, metrics

STUDY = ROOT / "examples" / "entropy_study" / "study.py"


def study(start: Path, out: Path, *more: str) -> subprocess.CompletedProcess[str]:
    given = [f"model.hf={start}", f"data.prompts={start}/train.jsonl", "eval.prompts=null", *more]
    arms = ("e1", "e2", "e3", "e4")
    return subprocess.run(
        [
            *(sys.executable, str(STUDY), "train.steps=6", *given),
            *("--seeds", "0", "--parts", "main", "--arms", *arms, "--out", str(out)),
        ],
        capture_output=True,
        text=True,
        timeout=500,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )


@pytest.mark.slow
@pytest.mark.timeout(600)  # a warm-up and four runs, on a machine that may have other work
def test_each_region_alone_moves_entropy_as_the_paper_says(tmp_path):
    start, out = tmp_path / "start", tmp_path / "runs"
    done = study(start, out)
    assert done.returncode == 0, done.stdout + done.stderr
    for arm, sign in (("e1", -1), ("e2", 1), ("e3", 1), ("e4", -1)):
        lines = metrics(out / f"{arm}-0")
        entropies = [line["entropy"] for line in lines]
        assert len(lines) == 6 and sign * (entropies[-1] - entropies[0]) > 0.01, (arm, entropies)
        shares = [line[f"gradient_share_{arm}"] for line in lines]
        # null: no group of the step was mixed, so there was no gradient at all
        assert [share for share in shares if share is not None] == pytest.approx(
            [1.0] * (6 - shares.count(None))
        )
        assert shares[0] is not None
        predicted = [
            sum(line[f"dh_{name}"] for line in lines)
            for name in ("measured", "directional", "second_order")
        ]
        assert all(sign * dh > 0 for dh in predicted), (arm, predicted)

    report = (out / "report.md").read_text()
    assert "4 sign agrees (one seed)" in report
    assert report.index("What does not reproduce\n\nNothing.") < report.index("What reproduces")
    html = (out / "report.html").read_text()
    assert html.count("data:image/png;base64,") == 2 and ".png" not in html

    again = study(start, out)
    assert again.returncode == 0 and "0 runs of 0 steps to make, 4 are there" in again.stdout
    other = study(start, out, "optim.beta1=0.8")
    assert other.returncode == 2 and "another configuration" in other.stderr
