"""The record of other runs, and the sentence that compares a run with it."""

from __future__ import annotations

import json

import pytest

from megatron_gpc.cli import main
from megatron_gpc.errors import UserError
from megatron_gpc.metrics.baseline import against, read_baseline, record
from megatron_gpc.metrics.runs import load_run
from megatron_gpc.metrics.tables import print_table, summary_table


def with_keys(folder, **keys):
    """The run, with other values in its configuration's lines."""
    file = folder / "config.yaml"
    lines = file.read_text().splitlines()
    for key, value in keys.items():
        (at,) = [i for i, line in enumerate(lines) if line.strip().startswith(f"{key}:")]
        lines[at] = f"{lines[at].split(':')[0]}: {value}"
    file.write_text("\n".join(lines) + "\n")
    return load_run(folder)


@pytest.fixture
def static(write_run, tmp_path, capsys):
    folders = [str(write_run(f"static-{seed}", "static", seed)) for seed in (0, 1, 2)]
    assert (
        main(
            [
                "plot",
                *folders,
                "--out",
                str(tmp_path / "a.png"),
                "--record",
                str(tmp_path / "static.json"),
            ]
        )
        == 0
    )
    assert "static.json" in capsys.readouterr().out
    return tmp_path / "static.json"


def test_the_sentence_says_how_far_a_run_is_from_its_baseline(static, write_run, capsys):
    run = with_keys(write_run("id", "id", 7), baseline=static)
    theirs = read_baseline(static)
    assert theirs.label == "static" and len(theirs.numbers["reward at its end"]) == 3
    said = against(run)
    assert said.startswith("against static (3 recorded runs): entropy over the run 0.6")
    assert " higher (2.1" in said and "; theirs 1.5" in said and "reward at its end 0.0" in said
    capsys.readouterr()
    assert main(["plot", str(run.folder)]) == 0  # the picture alone
    print_table(summary_table(run.folder))
    assert said in " ".join(capsys.readouterr().out.split())  # a table's width cuts it


def test_runs_that_cannot_be_compared_are_not(static, write_run):
    run = with_keys(write_run("a", "id"), baseline=static, lr=0.5)
    assert (
        against(run)
        == "not compared with static (static.json), whose optim.lr is 1e-06 and not 0.5"
    )
    # nor one that is under way, or has no baseline, or whose baseline has gone
    assert against(with_keys(write_run("b", "id", made=50), baseline=static)) == ""
    assert against(load_run(write_run("c", "id"))) == ""
    moved = with_keys(write_run("d", "id"), baseline=static)
    static.unlink()
    assert against(moved) == ""


def test_where_a_run_lies_and_how_it_is_cut_over_processes_do_not_matter(static, write_run):
    keys = {"hf": "/elsewhere/tiny", "micro_batch_size": 3, "tp": 2, "baseline": static}
    assert against(with_keys(write_run("a", "id"), **keys)).startswith("against static")


def test_a_baseline_is_of_finished_runs_of_one_experiment(write_run, tmp_path):
    one, other = write_run("a", "static", 0), write_run("b", "id", 1)
    with pytest.raises(UserError, match="differ in their seed alone, not static and id"):
        record([one, other], tmp_path / "out.json")
    with pytest.raises(UserError, match="has not made all its steps"):
        record([one, write_run("c", "static", 2, made=50)], tmp_path / "out.json")
    with pytest.raises(UserError, match="cannot be written"):
        record([one], tmp_path / "a" / "metrics.jsonl" / "out.json")


@pytest.mark.parametrize("change", [{"numbers": {}}, {"config": 1}, {"more": 1}, {"numbers": None}])
def test_a_damaged_record_is_refused(static, change):
    static.write_text(json.dumps(json.loads(static.read_text()) | change))
    with pytest.raises(UserError, match="is no record of runs"):
        read_baseline(static)
