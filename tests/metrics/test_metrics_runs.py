from __future__ import annotations

import math

import numpy as np
import pytest

from megatron_gpc.errors import UserError
from megatron_gpc.metrics.runs import Run, Series, group_runs, load_run


def _series(values):
    return Series(np.arange(1, len(values) + 1), np.array(values, dtype=float))


def test_start_and_end_are_means_over_a_twentieth_of_the_steps():
    series = _series(range(60))
    assert (series.window, series.first(), series.last()) == (3, 1.0, 58.0)


def test_a_short_series_is_not_smoothed():
    series = _series([3, 1, 2])
    assert (series.first(), series.last(), series.peak()) == (3.0, 2.0, (1, 3.0))
    assert series.smooth().values.tolist() == [3, 1, 2]


def test_the_peak_is_that_of_the_mean_and_not_of_one_outlier():
    values = [0.0] * 100
    values[10] = 4.0
    values[60:70] = [1.0] * 10
    step, height = _series(values).peak()
    assert height == 1.0 and 61 <= step <= 70


def test_smoothing_is_a_centred_mean_that_skips_nan():
    values = np.arange(80.0)
    values[40] = math.nan
    smooth = _series(values).smooth().values  # a window of 4: one before, two after
    assert smooth[0] == np.mean([0, 1, 2]) and smooth[79] == np.mean([78, 79])
    assert smooth[10] == np.mean([9, 10, 11, 12])
    assert smooth[40] == np.mean([39, 41, 42])


def test_a_metric_that_nobody_wrote_is_empty_and_its_numbers_are_nan(write_run):
    series = load_run(write_run("a")).series("padding_waste")
    assert len(series) == 0 and len(series.smooth()) == 0
    assert math.isnan(series.first()) and math.isnan(series.last())
    assert math.isnan(series.peak()[1])


def test_only_schedules_with_phases_have_a_boundary(write_run):
    boundaries = {
        name: load_run(write_run(name, name, steps=40, phase_split=0.3)).phase_boundary
        for name in ("static", "id", "did", "od")
    }
    assert boundaries == {"static": None, "id": 12.0, "did": 12.0, "od": None}


def test_seeds_are_pooled_and_labels_name_what_differs(write_run):
    runs = [
        load_run(write_run(f"{schedule}-{seed}-{eps}", schedule, seed, eps_high=eps))
        for schedule, eps in (("static", 0.2), ("static", 0.28), ("id", 0.2))
        for seed in (0, 1)
    ]
    assert [(group.label, [run.seed for run in group.runs]) for group in group_runs(runs)] == [
        ("static eps_high=0.2", [0, 1]),
        ("static eps_high=0.28", [0, 1]),
        ("id eps_high=0.2", [0, 1]),
    ]
    assert [group.label for group in group_runs(runs[4:])] == ["id"]


def test_a_label_names_a_users_schedule_without_its_folder_unless_two_have_one_name(write_run):
    own = [load_run(write_run(name)) for name in "abc"]
    for run, schedule in zip(own, ("/x/own.py:A", "/x/own.py:A", "/y/own.py:A"), strict=True):
        run.config.update({"clip.schedule": schedule})
    assert [group.label for group in group_runs(own[:2])] == ["own.py:A"]
    assert [group.label for group in group_runs(own)] == ["/x/own.py:A", "/y/own.py:A"]


def test_labels_leave_out_where_a_run_lies_and_shorten_paths_and_keys():
    def run(seed, **config):
        return Run(None, {"seed": seed, "clip.schedule": "id", **config}, [])

    runs = [
        run(
            0,
            **{
                "run_dir": "/r/0",
                "rollout.server.url": "http://a",
                "model.hf": "/m/x/hf",
                "optim.eps": 1,
                "other.eps": 1,
            },
        ),
        run(
            1,
            **{
                "run_dir": "/r/1",
                "rollout.server.url": "http://b",
                "model.hf": "/m/y/hf",
                "optim.eps": 2,
                "other.eps": 2,
            },
        ),
    ]
    assert [group.label for group in group_runs(runs)] == [
        "id hf=x/hf optim.eps=1 other.eps=1",
        "id hf=y/hf optim.eps=2 other.eps=2",
    ]


def test_the_mean_over_seeds_covers_the_steps_that_all_have(write_run):
    runs = [load_run(write_run("a", seed=0, made=60)), load_run(write_run("b", seed=1, made=40))]
    (group,) = group_runs(runs)
    mean, spread = group.mean_over_seeds("reward")
    assert mean.steps.tolist() == list(range(1, 41))
    smooth = [run.series("reward").smooth().values[:40] for run in runs]
    np.testing.assert_allclose(mean.values, (smooth[0] + smooth[1]) / 2)
    np.testing.assert_allclose(spread.values, abs(smooth[0] - smooth[1]) / math.sqrt(2))


def test_a_file_in_the_place_of_a_folder_is_refused(write_run):
    folder = write_run("a")
    with pytest.raises(UserError, match=f"metrics.jsonl is a file; give the folder .*{folder}"):
        load_run(folder / "metrics.jsonl")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda text: None, "give the folder of a run"),
        (lambda text: "a: [", "not valid YAML"),
        (lambda text: text.replace("  steps: 100\n", ""), "train.steps is missing"),
        (lambda text: text.replace("seed: 0", "seed: zero"), "seed is missing or no int"),
    ],
)
def test_a_configuration_that_is_missing_or_damaged_is_refused(write_run, change, message):
    folder = write_run("a")
    file = folder / "config.yaml"
    text = change(file.read_text())
    file.unlink()
    if text is not None:
        file.write_text(text)
    with pytest.raises(UserError, match=rf"config\.yaml: .*{message}"):
        load_run(folder)
