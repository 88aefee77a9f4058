"""The benchmarks refuse in one line what they cannot measure."""

from __future__ import annotations

import runpy
import sys

import pytest
from commands import ROOT

BENCH = ROOT / "tools" / "bench"


@pytest.mark.parametrize(
    ("script", "words", "said"),
    [
        ("loop", "--steps 0", "--steps: expected a whole number from 1 to"),
        ("loop", "--layouts 2x", "--layouts: expected TPxPP such as 2x2, got '2x'"),
        ("loop", "train.stepz=3", "did you mean 'train.steps'?"),
        ("overlap", "--steps 3", "--steps: expected a whole number from 4 to"),
        ("overlap", "rollout.group_size=1", "rollout.group_size: input should be"),
        ("judge", "--hung 513", "--hung: expected a whole number from 1 to 512"),
        ("token_stats", "--tokens 256 0", "--tokens: expected a whole number from 1 to"),
        ("head", "--vocab many", "--vocab: expected a whole number from 1 to"),
        ("head", "--ways fast", "--ways: invalid choice: 'fast'"),
        ("checkpoint", "--hidden 100", "--hidden: expected a multiple of 128, got 100"),
        ("update", "--hidden 64", "--hidden: expected a multiple of 128, got 64"),
        ("handover", "--hidden 320", "--hidden: expected a multiple of 256, got 320"),
        ("handover", "--rounds 0", "--rounds: expected a whole number from 1 to"),
        ("handover", "rollout.server.engine=2", "did you mean 'rollout.server.engines'?"),
        ("update", "--rounds -1", "--rounds: expected a whole number from 1 to"),
    ],
)
def test_bad_arguments_are_said_in_one_line(script, words, said, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [f"{script}.py", *words.split()])
    monkeypatch.syspath_prepend(str(BENCH))
    with pytest.raises(SystemExit) as left:
        runpy.run_path(str(BENCH / f"{script}.py"), run_name="__main__")
    printed = capsys.readouterr().err
    assert left.value.code == 2 and printed.count("\n") == 1 and said in printed
