"""The entropy study at a reduced size: one seed, one region at a time."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from commands import ROOT, metrics

STUDY = ROOT / "examples" / "entropy_study"
sys.path.insert(0, str(STUDY))


def study(start: Path, out: Path, *more: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [
            *(sys.executable, str(STUDY / "study.py"), "--seeds", "0", "--steps", "18"),
            *("--arms", "e1", "e2", "e3", "e4", "--start", str(start), "--out", str(out), *more),
            *("rollout.prompts_per_step=16", "optim.lr=3e-4", "eval.samples=4"),
        ],
        capture_output=True,
        text=True,
        timeout=500,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )


@pytest.mark.slow
@pytest.mark.timeout(600)  # four runs, on a machine that may have other work
def test_each_region_alone_moves_entropy_as_the_paper_says(warm_start, tmp_path):
    done = study(warm_start, tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    for arm, sign in (("e1", -1), ("e2", 1), ("e3", 1), ("e4", -1)):
        lines = metrics(tmp_path / f"{arm}-0")
        entropies = [line["entropy"] for line in lines]
        assert len(lines) == 6 and sign * (entropies[-1] - entropies[0]) > 0.01, (arm, entropies)
        shares = [line[f"gradient_share_{arm}"] for line in lines]
        # null: no group of the step was mixed, so there was no gradient at all
        assert [share for share in shares if share is not None] == pytest.approx(
            [1.0] * (6 - shares.count(None))
        )
        assert shares[0] is not None
        measured, along = (
            sum(line[name] for line in lines) for name in ("dh_measured", "dh_directional")
        )
        assert sign * measured > 0 and sign * along > 0, (arm, measured, along)

    report = (tmp_path / "report.md").read_text()
    assert "Of 4 claims: 4 sign agrees (one seed)" in report
    assert report.index("What does not reproduce\n\nNothing.") < report.index("What reproduces")
    html = (tmp_path / "report.html").read_text()
    assert html.count("data:image/png;base64,") == 3 and ".png" not in html

    again = study(warm_start, tmp_path)
    assert again.returncode == 0 and "0 runs of 0 steps to make, 4 are there" in again.stdout
    other = study(warm_start, tmp_path, "optim.beta1=0.8")
    assert other.returncode == 2 and "another configuration" in other.stderr


def test_verdicts_follow_from_the_numbers_alone():
    from claims import Claim, Verdict, interval

    def word(sign: int, *values: float) -> str:
        return Verdict(Claim("a", "", (), lambda s: 0.0, sign), interval(values)).word

    assert word(1, 0.1, 0.2, 0.3) == "not shown"  # 0.2 ± 0.248
    assert word(1, 0.2, 0.25, 0.3) == "reproduced"
    assert word(-1, 0.2, 0.25, 0.3) == "opposite"
    assert word(-1, -0.1) == "sign agrees (one seed)"
    assert word(1, float("nan"), float("nan")) == "not measured"
    assert str(interval([0.1, 0.2, 0.3])) == "0.200 ± 0.248"


@pytest.mark.parametrize("degrees", [1, 2, 4, 9, 30])
def test_quantiles_are_those_of_students_t(degrees):
    from math import gamma, pi, sqrt

    import numpy as np
    from claims import T_975

    x = np.linspace(0, T_975[degrees - 1], 200_001)
    scale = gamma((degrees + 1) / 2) / (sqrt(degrees * pi) * gamma(degrees / 2))
    density = scale * (1 + x**2 / degrees) ** (-(degrees + 1) / 2)
    assert np.trapezoid(density, x) == pytest.approx(0.475, abs=2e-5)
