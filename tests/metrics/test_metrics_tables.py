from __future__ import annotations

import json

import pytest

from megatron_gpc.metrics.plots import plot_run
from megatron_gpc.metrics.tables import compare_table, print_table, summary_table


def _rows(table, capsys):
    """The printed table as {first cell: the line's other words}."""
    print_table(table)
    lines = [line.strip() for line in capsys.readouterr().out.splitlines()]
    cells = [[cell.strip() for cell in line.split("  ") if cell] for line in lines if line]
    return {first: rest for first, *rest in cells}


def test_the_summary_shows_reward_entropy_diversity_clipping_and_speed(write_run, capsys):
    rows = _rows(summary_table(write_run("a", seed=3)), capsys)
    assert "id, seed 3: 100 of 100 steps" in rows
    assert [float(value) for value in rows["reward"]] == pytest.approx([0.41, 0.89], abs=0.03)
    start, peak, end = rows["entropy, nats a token"]
    assert float(start) < 1.8 and float(end) < 1.8
    assert peak.startswith("2.5") and 40 <= int(peak.split("(step ")[1].rstrip(")")) <= 62
    assert rows["held-out reward"] == ["0.400", "0.900"]
    assert rows["distinct right answers"] == ["23.000", "36.000"]
    assert rows["clipped at lower bound, %"] == ["2.00"]
    assert rows["clipped at upper bound, %"] == ["3.00"]
    assert rows["tokens a second"] == ["800"]
    assert rows["time in steps"] == ["0:05:00"]


def test_the_summary_draws_entropy_and_has_two_of_pass_at_k(write_run, capsys):
    folder = write_run("a")
    measured = {f"eval_pass_at_{k}": 0.1 * k for k in (1, 2, 4, 8)}
    passes = [{"step": step, **measured} for step in (0, 100)]
    (folder / "eval.jsonl").write_text("".join(json.dumps(line) + "\n" for line in passes))
    rows = _rows(summary_table(folder), capsys)
    assert rows["held-out pass@4"] == ["0.400", "0.400"] and "held-out pass@8" in rows
    assert "held-out pass@2" not in rows
    (drawn,) = [row for row in rows if row.startswith("entropy: ")]
    assert len(drawn) == len("entropy: ") + 44 and drawn[9] == "▁" and "█" in drawn[25:37]


def test_the_summary_names_the_picture_once_it_is_there(write_run, monkeypatch, capsys):
    folder = write_run("a", steps=2)
    assert not any(row.startswith("plots") for row in _rows(summary_table(folder), capsys))
    plot_run(folder)
    monkeypatch.chdir(folder.parent)
    assert "plots: a/plots.png" in _rows(summary_table(folder), capsys)


def test_the_summary_of_one_step_without_evaluation(write_run, capsys):
    rows = _rows(summary_table(write_run("a", steps=1, evaluated=False)), capsys)
    assert rows["reward"][0] == rows["reward"][1]
    assert rows["entropy, nats a token"][1].endswith("(step 1)")
    assert "held-out reward" not in rows and rows["tokens a second"] == ["800"]


def test_an_evaluation_that_is_still_to_come_is_a_dash(write_run, capsys):
    folder = write_run("a", evaluated=False)
    file = folder / "metrics.jsonl"
    file.write_text('{"step": 0, "eval_reward": 0.4}\n' + file.read_text())
    assert _rows(summary_table(folder), capsys)["held-out reward"] == ["0.400", "-"]


def test_the_comparison_pools_seeds_and_pairs_them_with_the_first_group(write_run, capsys):
    folders = [write_run(f"static-{seed}", "static", seed) for seed in (0, 1, 2)]
    folders += [write_run(f"id-{seed}", "id", seed) for seed in (1, 2, 3)]
    rows = _rows(compare_table(folders), capsys)
    assert rows["static"][0] == "3" and rows["id"][0] == "3"
    assert rows["static"][-1] == "32.000 ± 2.000"
    assert rows["id"][-1] == "34.000 ± 2.000"
    assert rows["id - static"][0] == "2 paired"
    assert rows["id - static"][-1] == "0.000 ± 0.000"  # seed by seed the two are the same


def test_the_comparison_of_single_runs_has_no_spread(write_run, capsys):
    rows = _rows(compare_table([write_run("a", "static", 0), write_run("b", "id", 1)]), capsys)
    assert rows["static"][-1] == "30.000" and "id - static" not in rows


def test_the_summary_has_the_share_of_signal_once_it_was_measured(write_run, capsys):
    folder = write_run("a", steps=3)
    row = "signal share of the gradient"
    assert row not in _rows(summary_table(folder), capsys)
    first, *rest = (folder / "metrics.jsonl").read_text().splitlines()
    last = json.loads(rest.pop()) | {"signal_share": 0.4}
    lines = [json.dumps(json.loads(first) | {"signal_share": 0.1}), *rest, json.dumps(last)]
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    assert _rows(summary_table(folder), capsys)[row] == ["0.25"]


def test_the_summary_of_a_steered_run_says_how_well_it_followed(write_run, capsys):
    folder = write_run("a", "target", target=1.0)  # entropy stays at 1.5
    rows = _rows(summary_table(folder), capsys)
    assert float(rows["entropy's distance from target, nats"][0]) == pytest.approx(0.5, abs=0.01)
    assert rows["steps at a limit of lambda, %"] == ["100"]
    assert rows["the same while lambda has room, nats"] == ["-"]
    assert "steps at a limit of lambda, %" not in _rows(summary_table(write_run("b")), capsys)
