"""What is said of a changed configuration in mid-run."""

from __future__ import annotations

import pytest
import torch
import yaml
from tiny import run_config

from megatron_gpc.config.file import dump
from megatron_gpc.doctor.continued import consequences, learning_rate
from megatron_gpc.run.folder import prepare


@pytest.fixture
def said(tmp_path):
    """said(step, before, after): what is said when overrides `before` become `after`."""

    def ask(step, before, after):
        old = yaml.safe_load(dump(run_config(tmp_path, tmp_path, *before)))
        return consequences(old, run_config(tmp_path, tmp_path, *after), step)

    return ask


def test_other_steps_rescale_bounds_and_learning_rate(said):
    (bounds, rate) = said(
        6, ["train.steps=50", "optim.decay=linear"], ["train.steps=12", "optim.decay=linear"]
    )
    assert bounds == (
        "train.steps: the bounds of the ratio jump at step 7: [0.800, 1.428] at p = 0, "
        "[0.800, 1.238] at p = 1 -> [0.800, 1.200] at p = 0, [0.800, 1.200] at p = 1"
    )
    assert rate == "train.steps: the learning rate jumps at step 7: 0.00088 -> 0.0005"


@pytest.mark.parametrize(
    ("before", "after", "says"),
    [
        ([], ["clip.phase_split=0.25"], "clip.phase_split: the bounds of the ratio jump at step 3"),
        ([], ["clip.hi_intercept=0.7"], "clip.hi_intercept: the bounds of the ratio jump"),
        ([], ["clip.schedule=static"], "clip.schedule: the bounds of the ratio jump"),
        ([], ["clip.schedule=od"], "clip.schedule: a schedule begins anew at step 3"),
        (
            ["clip.schedule=od"],
            ["clip.schedule=od", "train.steps=20"],
            "lowered above 0.92 instead of 0.84 times the first",
        ),
        (
            ["clip.schedule=target", "clip.target=0.5"],
            ["clip.schedule=target", "clip.target=80%"],
            "clip.target: from step 3 on entropy is steered to another curve; shares are still",
        ),
        (
            ["clip.schedule=target", "clip.target=0.5"],
            ["clip.schedule=target", "clip.target=0.5", "clip.target_gain=5"],
            "clip.target_gain: the schedule target goes on, in its own way, under these",
        ),
        (
            ["optim.decay=cosine"],
            ["optim.decay=cosine", "train.mini_batches=2"],
            "train.mini_batches: the learning rate jumps at step 3: 0.000905 -> 0.000976",
        ),
        ([], ["seed=5"], "seed: the rest of this epoch comes in another order"),
        ([], ["rollout.temperature=0.5"], "entropies are of another distribution"),
        ([], ["rollout.group_size=8"], "another baseline"),
        ([], ["eval.prompts=/p.jsonl"], "evaluations before and after cannot be compared"),
        ([], ["train.steps=2"], "2 steps are done"),
    ],
    ids=str,
)
def test_a_consequence_is_named_with_its_key(said, before, after, says):
    assert any(says in one for one in said(2, before, after))


def test_nothing_is_said_of_what_changes_nothing(said):
    assert said(2, [], []) == []
    assert said(2, ["clip.schedule=static"], ["clip.schedule=static", "train.steps=20"]) == []
    assert said(2, [], ["checkpoint.every=7", "parallel.tp=2", "clip.lo_slope=-0.2"]) == []


def test_a_start_that_continues_says_it(tmp_path, capsys):
    prepare(run_config(tmp_path, tmp_path)).close()
    (tmp_path / "run" / "checkpoints" / "step_000002").mkdir(parents=True)
    prepare(run_config(tmp_path, tmp_path, "train.steps=40"), consequences).close()
    said = capsys.readouterr().err
    assert "train.steps 10 -> 40" in said and "the bounds of the ratio jump at step 3" in said


@pytest.mark.parametrize("decay", ["constant", "linear", "cosine"])
def test_the_learning_rate_is_megatron_cores(tmp_path, decay):
    from megatron_gpc.mcore.policy import _learning_rate

    config = run_config(
        tmp_path, tmp_path, f"optim.decay={decay}", "optim.warmup_updates=3", "optim.min_lr=1e-5"
    )
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = _learning_rate(config, optimizer)
    for updates in range(14):
        assert optimizer.param_groups[0]["lr"] == pytest.approx(learning_rate(config, updates))
        scheduler.step(increment=1)
