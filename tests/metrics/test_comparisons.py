"""The scripts that compare runs over seeds: what they refuse, and reports of finished runs."""

from __future__ import annotations

import json
import re
import shutil
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
from commands import ROOT

from megatron_gpc.config import Config, parts
from megatron_gpc.config.file import dump

EXAMPLES = ROOT / "examples"
sys.path.append(str(EXAMPLES))

from comparison import comparison_parser, plan  # noqa: E402

SCRIPTS = {
    "entropy_control/compare.py": {"seeds": [0, 1], "arms": ["static", "target"]},
    "entropy_control/tracking.py": {"seeds": [20, 21], "tasks": ["control"], "curves": ["line"]},
    "entropy_study/study.py": {"seeds": [10, 3], "arms": ["static"], "parts": ["main"]},
    "exploration/compare.py": {"seeds": [10, 11], "arms": ["static", "hi"]},
    "arithmetic/compare.py": {"seeds": [0, 1], "arms": ["static", "id"], "start": "start"},
}
"""Each with the runs that it is asked for here."""
LAST = {
    "entropy_control/compare.py": "static.json",
    "entropy_control/tracking.py": "report.md",
    "entropy_study/study.py": "report.html",
    "exploration/compare.py": "report.md",
    "arithmetic/compare.py": "comparison.png",
}
"""What a report writes after everything else."""
STEPS = "train.steps=4"
every_script = pytest.mark.parametrize("script", SCRIPTS)


def of_script(script: str, name: str) -> Any:
    return parts.find("model.build", f"{EXAMPLES}/{script}:{name}", {})


@pytest.fixture
def call(monkeypatch, capsys):
    """call(script, *words): its exit code, what it printed, and the one line that it said."""

    def call(script: str, *words: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", [Path(script).name, *words])
        code = of_script(script, "main")()
        printed = capsys.readouterr()
        assert printed.err.count("\n") == (code != 0), printed.err
        return code, printed.out, printed.err

    return call


@pytest.fixture
def report(call, tmp_path):
    """report(script, *overrides): `call` with --report, of the runs that `make` has made."""

    def report(script: str, *overrides: str) -> tuple[int, str, str]:
        asked = [
            word
            for name, of in SCRIPTS[script].items()
            for word in (f"--{name}", *map(str, [of] if isinstance(of, str) else of))
        ]
        return call(script, STEPS, *overrides, *asked, "--report", "--out", str(tmp_path / "runs"))

    return report


@pytest.fixture
def make(tmp_path):
    """make(script): the runs that the script is asked for, with few numbers; their folders."""

    def make(script: str) -> list[Path]:
        given = Namespace(**SCRIPTS[script], out=tmp_path / "runs", overrides=[STEPS])
        planned = plan(of_script(script, "arms_of")(given), given)
        for one in planned:
            write(one.config)
        return [one.config.run_dir for one in planned]

    return make


def write(config: Config) -> None:
    config.run_dir.mkdir(parents=True)
    (config.run_dir / "config.yaml").write_text(dump(config))
    steps = range(1, config.train.steps + 1)
    for name, lines in {
        "metrics": [
            {
                **{"step": n, "reward": 0.5, "entropy": 1 - 0.1 * n, "clip_lambda": 0.3 * n},
                **{"entropy_target": 1 - 0.15 * n, "clip_fraction_low": 0.0},
            }
            for n in steps
        ],
        "eval": [{"step": n, "eval_reward": 0.5, "eval_solved": 0.1} for n in (0, steps[-1])],
    }.items():
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (config.run_dir / f"{name}.jsonl").write_text(text)


@every_script
def test_bad_arguments_are_said_in_one_line(script, call, tmp_path):
    (tmp_path / "file").write_text("")
    for words, said in (
        (["--jobs", "0"], "--jobs: expected a whole number from 1"),
        (["--out", str(tmp_path / "file")], "is a file; name a folder"),
        (["--seeds", "many"], "invalid int value: 'many'"),
        (["--seeds", "-1"], "seed: input should be greater than or equal to 0"),
        (["train.stepz=3"], "did you mean 'train.steps'?"),
        (["train.steps=-3"], "train.steps: input should be"),
        (["seed=3"], "the comparison itself sets seed"),
        (["run_dir=here"], "the comparison itself sets run_dir"),
        (["clip={schedule: od}"], "the comparison itself sets clip.schedule"),
    ):
        code, _, line = call(script, *words, "--report")
        assert code == 2 and said in line, (words, line)


@every_script
def test_a_report_is_made_of_the_runs_that_were_asked_for_and_of_no_others(script, report, make):
    folders = make(script)
    out, last = folders[0].parent, folders[-1] / "config.yaml"
    config = last.read_text()
    for wrong, said in (
        (config.replace("mini_batches: 4", "mini_batches: 2"), "train.mini_batches is 2 there"),
        (re.sub("(?m)^  samples: .*", "  samples: many", config), "eval.samples: input should be"),
        (config.replace("beta1", "betta1"), "unknown key 'optim.betta1'"),
        ("{", "not valid YAML"),
    ):
        assert wrong != config
        last.write_text(wrong)
        code, _, line = report(script)
        assert code == 2 and str(folders[-1]) in line and said in line
    last.write_text(config.replace(str(ROOT), "/another/checkout"))  # the same files
    code, _, line = report(script, "optim.beta1=0.8")
    assert code == 2 and "another configuration: optim.beta1 is 0.9 there, and 0.8 is" in line

    file = folders[0] / "metrics.jsonl"
    metrics = file.read_text()
    for name in ("entropy", *(["clip_lambda", "entropy_target"] if "tracking" in script else [])):
        absent = metrics.replace(f'"{name}"', '"x"')
        null = re.sub(f'"{name}": [^,]*', f'"{name}": null', metrics)
        for wrong in (absent, null):
            file.write_text(wrong)
            code, _, line = report(script)
            assert code == 2 and f"{file} has no {name}; remove the folder" in line

    file.write_text(metrics.splitlines()[0] + "\n")  # not finished: left out
    (out / LAST[script]).mkdir()
    code, _, line = report(script)
    assert code == 2 and f"{out / LAST[script]}: " in line and "cannot be written" in line
    (out / LAST[script]).rmdir()
    (out / "seconds.txt").write_text("broken")
    assert report(script)[0] == 0
    assert (out / LAST[script]).stat().st_size
    shutil.rmtree(out)
    assert "no run is finished yet" in report(script)[2]


def test_a_picture_that_cannot_be_written_is_named(report, make):
    picture = make("exploration/compare.py")[0].parent / "steps.png"
    picture.mkdir()
    code, _, line = report("exploration/compare.py")
    assert code == 2 and f"{picture}: the picture cannot be written" in line


def test_the_study_says_which_seeds_and_how_many_steps_it_had(report, make, tmp_path):
    make("entropy_study/study.py")
    report("entropy_study/study.py")
    text = (tmp_path / "runs" / "report.md").read_text()
    assert "2 runs of examples/entropy_control, seeds 3, 10: 4 steps, 32 prompts x 8" in text
    assert "16 updates a rollout, Adam 0.0005, TP 1, PP 1. Of seeds 3 it is not known" in text
    assert "study.py train.steps=4 --seeds 10 3 --parts main --arms static\n" in text


def test_arms_that_are_of_no_part_that_was_asked_for_are_named(call):
    code, _, line = call("entropy_study/study.py", "--parts", "coin", "--arms", "coin-hi", "hi")
    assert code == 2 and "--arms hi: is of part main, and --parts are coin; the arms of" in line


def test_an_override_may_set_what_does_not_make_an_arm_another(call, tmp_path):
    study = "entropy_study/study.py"
    given = ("--report", "--arms", "e1", "coin-static", "--out", str(tmp_path))
    assert "no run is finished yet" in call(study, "train.steps=4", "optim.beta1=0.8", *given)[2]
    assert "the comparison itself sets optim.lr" in call(study, "optim.lr=1", *given)[2]


def test_a_seed_that_is_named_twice_counts_once(tmp_path):
    parser = comparison_parser("Some runs", (0,), tmp_path)
    assert parser.parse_args(["--seeds", "2", "1", "2"]).seeds == [2, 1]


def test_the_report_of_tracking_says_how_far_entropy_was_from_its_curve(report, make):
    script = "entropy_control/tracking.py"
    for folder, apart in zip(make(script), (0.01, 0.03), strict=True):
        columns = ("step", "reward", "entropy_target", "entropy", "clip_lambda")
        rows = [
            (1, 0.5, 1.0, 1.0 + apart, 0.5),
            (2, 0.5, 0.8, 0.8 - apart, -0.5),
            (3, 0.5, 0.6, 0.6 + 2 * apart, -1.0),
            (4, 0.5, 0.5, 0.5 + 2 * apart, 1.0),
        ]
        lines = [json.dumps(dict(zip(columns, row, strict=True))) + "\n" for row in rows]
        (folder / "metrics.jsonl").write_text("".join(lines))
    row = next(one for one in report(script)[1].splitlines() if "| control | line |" in one)
    found = [float(cell.split("±")[0]) for cell in row.split("|")[3:-1]]
    mean = 0.02 * 2.5**0.5  # root of (1 + 1 + 4 + 4) / 4
    assert found == pytest.approx([2, 0.5, mean, 200 * mean, 4.0, 50.0, 4.0], abs=1e-3)


def test_a_level_curve_or_a_step_without_tokens_leaves_the_rest_of_a_report(report, make):
    script = "entropy_control/tracking.py"
    level, other = make(script)
    file = level / "metrics.jsonl"
    file.write_text(re.sub('"entropy_target": [^,]*', '"entropy_target": 0.7', file.read_text()))
    file = other / "metrics.jsonl"
    first, *rest = file.read_text().splitlines(keepends=True)
    file.write_text(re.sub(', "clip_lambda".*?(?=, "clip_f)', "", first) + "".join(rest))
    row = next(one for one in report(script)[1].splitlines() if "| control | line |" in one)
    assert "nan" not in row and "inf" not in row and "| 0.300 |" in row
