from __future__ import annotations

import json

import pytest
from matplotlib.image import imread

from megatron_gpc.errors import UserError
from megatron_gpc.metrics.plots import overlay_figure, plot_run, plot_runs, run_figure
from megatron_gpc.metrics.runs import load_run
from megatron_gpc.metrics.tables import compare_table, print_table, summary_table


def _panels(figure):
    return {ax.get_title(loc="left"): ax for ax in figure.axes}


def _texts(figure_or_axes):
    legends = getattr(figure_or_axes, "legends", None) or [figure_or_axes.get_legend()]
    return [text.get_text() for text in legends[0].get_texts()]


def _has_phase_line(ax):
    return any(line.get_label() == "_phase" for line in ax.lines)


def test_a_run_is_drawn_into_its_folder(write_run):
    folder = write_run("a")
    assert plot_run(folder) == folder / "plots.png"
    height, width, _ = imread(folder / "plots.png").shape
    assert width > 1200 and height > 900
    assert (folder / "plots.png").stat().st_size > 50_000


def test_a_run_has_every_panel(write_run):
    figure = run_figure(load_run(write_run("a")))
    panels = _panels(figure)
    assert {
        "entropy [nats a token]",
        "reward",
        "distinct right answers a prompt",
        "ratio bounds over p",
        "ratio bounds over steps",
        "tokens clipped",
        "tokens by region (rest: A = 0)",
        "gradient norm",
        "largest importance ratio",
        "the gradient's mass by region",
        "predicted change of H, by region",
        "tokens of each region clipped",
    } <= panels.keys()
    assert _texts(panels["reward"]) == ["training prompts", "held-out prompts"]
    assert _texts(panels["ratio bounds over steps"]) == ["p = 0", "p = 0.5", "p = 1"]
    assert [text[:2] for text in _texts(panels["tokens by region (rest: A = 0)"])] == [
        "E2",
        "E3",
        "E1",
        "E4",
    ]


@pytest.mark.parametrize(
    ("schedule", "phases"), [("id", True), ("did", True), ("static", False), ("od", False)]
)
def test_the_phase_boundary_is_marked_where_there_are_phases(write_run, schedule, phases):
    panels = _panels(run_figure(load_run(write_run("a", schedule, phase_split=0.3))))
    entropy = panels["entropy [nats a token]"]
    assert _has_phase_line(entropy) is phases
    if phases:
        (line,) = [line for line in entropy.lines if line.get_label() == "_phase"]
        assert list(line.get_xdata()) == [30.0, 30.0]


def test_bounds_over_p_are_the_lines_of_the_schedule(write_run):
    lines = _panels(run_figure(load_run(write_run("a"))))["ratio bounds over p"].lines[1:]
    assert len(lines) == 10  # five steps, upper and lower
    assert list(lines[0].get_ydata()) == pytest.approx([1.5, 1.25])  # 1 + Hi(p) at the first step
    assert list(lines[1].get_ydata()) == pytest.approx([0.8, 0.8])


def test_a_steered_run_shows_target_and_lambda(write_run, tmp_path):
    folders = [write_run("a", "target", target=[[0, 1.0], [1, 2.0]]), write_run("b", "static")]
    panels = _panels(run_figure(load_run(folders[0])))
    assert _texts(panels["entropy [nats a token]"]) == ["measured", "target"]
    (lambdas,) = panels["lambda: Hi(p) at 1, Lo(p) at -1"].lines[1:]
    assert len(lambdas.get_xdata()) == 100 and "ratio bounds over p" not in panels
    both = overlay_figure([load_run(folder) for folder in folders])
    assert _texts(both) == ["target (1 seed)", "static (1 seed)"]  # static reads no clip.target
    (target,) = [
        line
        for line in _panels(both)["entropy [nats a token]"].lines
        if line.get_label() == "_target"
    ]
    assert (target.get_ydata()[0], target.get_ydata()[-1]) == pytest.approx((1.0, 2.0), abs=0.05)
    assert plot_runs(folders, tmp_path / "both.png").stat().st_size > 50_000


@pytest.mark.filterwarnings("error")
def test_predictions_are_drawn_against_the_measured_change_with_their_correlation(write_run):
    folder = write_run("a")
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for number, line in enumerate(lines):
        line["dh_measured"] = 0.01 * (number % 7 - 3)
        line["dh_directional"] = 2 * line["dh_measured"]
        line["dh_second_order"] = line["dh_measured"]
        line["dh_predicted"] = -line["dh_measured"] if number else None
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    panel = _panels(run_figure(load_run(folder)))["change of H in a step (r = -1.00, 1.00, 1.00)"]
    assert _texts(panel) == ["logit space", "first order", "second order"]
    assert [len(points.get_offsets()) for points in panel.collections] == [99, 100, 100]
    plot_run(folder)


def test_a_run_without_evaluation_shows_response_lengths_instead(write_run):
    panels = _panels(run_figure(load_run(write_run("a", evaluated=False))))
    assert "response length [tokens]" in panels and "distinct right answers a prompt" not in panels


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("steps", [1, 100])
def test_a_run_of_one_step_is_drawn(write_run, steps):
    folder = write_run("a", steps=steps, made=1)
    assert plot_run(folder).stat().st_size > 30_000


@pytest.mark.filterwarnings("error")
def test_metrics_that_are_missing_or_null_leave_a_gap_and_not_an_error(write_run):
    folder = write_run("a")
    gone = ("ratio_max", "share_e3", "eps_low_at_p05", "clip_fraction_low", "clip_fraction_high")
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        for name in gone:
            line.pop(name, None)
        if line["step"] in (5, 6, 7, 8, 9, 10, 11, 12):
            line["grad_norm"] = line["entropy"] = None
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    panels = _panels(run_figure(load_run(folder)))
    for title in (
        "largest importance ratio",
        "tokens by region (rest: A = 0)",
        "ratio bounds over steps",
        "ratio bounds over p",
        "tokens clipped",
    ):
        assert "not recorded" in [text.get_text() for text in panels[title].texts]
    plot_run(folder)


def test_runs_are_overlaid_by_group_with_a_band_and_every_run(write_run, tmp_path):
    folders = [
        write_run(f"{schedule}-{seed}", schedule, seed)
        for schedule in ("static", "id")
        for seed in (0, 1, 2)
    ]
    figure = overlay_figure([load_run(folder) for folder in folders])
    assert _texts(figure) == ["static (3 seeds)", "id (3 seeds)"]
    panels = _panels(figure)
    assert set(panels) == {
        "entropy [nats a token]",
        "reward",
        "tokens clipped at the upper bound",
        "tokens clipped at the lower bound",
        "held-out reward",
        "distinct right answers a prompt",
    }
    reward = panels["reward"]
    assert len(reward.collections) == 2  # a band a group
    assert len(reward.lines) == 2 * (3 + 1) + 1  # runs and mean of each group, the phase boundary
    out = plot_runs(folders, tmp_path / "new" / "compare.png")
    assert out.stat().st_size > 50_000


@pytest.mark.filterwarnings("error")
def test_runs_of_different_kinds_and_lengths_are_overlaid(write_run, tmp_path):
    folders = [
        write_run("long", steps=60, phase_split=0.4),
        write_run("cut", made=7),
        write_run("one", "did", steps=1),
        write_run("blind", "static", evaluated=False),
        write_run("other seed", "static", seed=1),
    ]
    assert plot_runs(folders, tmp_path / "odd.png").stat().st_size > 50_000
    entropy = _panels(overlay_figure([load_run(folder) for folder in folders]))[
        "entropy [nats a token]"
    ]
    assert not _has_phase_line(entropy)  # they differ


def test_runs_without_evaluation_have_four_panels(write_run):
    folders = [write_run(f"{seed}", seed=seed, evaluated=False) for seed in (0, 1)]
    assert len(overlay_figure([load_run(folder) for folder in folders]).axes) == 4


def test_a_run_without_a_step_is_refused(write_run):
    folder = write_run("a")
    (folder / "metrics.jsonl").write_text('{"step": 0, "eval_reward": 0.5}\n')
    with pytest.raises(UserError, match="no training step"):
        plot_run(folder)


def test_a_picture_that_cannot_be_written_is_refused(write_run, tmp_path):
    folder = write_run("a", steps=1)
    with pytest.raises(UserError, match=r"picture\.txt: a picture's name ends in one of .*png"):
        plot_run(folder, tmp_path / "picture.txt")
    with pytest.raises(UserError, match="picture cannot be written"):
        plot_run(folder, folder / "config.yaml" / "picture.png")


@pytest.mark.filterwarnings("error::RuntimeWarning")
@pytest.mark.parametrize("empty", [[4, 5, 17], list(range(20))], ids=["some", "all"])
def test_steps_without_anything_to_train_on_leave_gaps_in_the_pictures(write_run, capsys, empty):
    folders = [write_run(name, seed=seed, steps=20) for seed, name in enumerate(("a", "b"))]
    file = folders[0] / "metrics.jsonl"
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    for i in empty:
        known = ("step", "reward", "tokens_per_second", "seconds_")
        lines[i] = {name: v if name.startswith(known) else None for name, v in lines[i].items()}
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert plot_run(folders[0]).stat().st_size > 10_000
    assert plot_runs(folders, folders[0] / "both.png").stat().st_size > 10_000
    print_table(summary_table(folders[0]))
    print_table(compare_table(folders))
    said = capsys.readouterr().out
    assert "nan" not in said and ("(step " in said) == (len(empty) < 20)
