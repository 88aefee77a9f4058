"""Sinks against the real libraries, offline; and those that a user brings."""

from __future__ import annotations

import json
import math
import os
import sys

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megatron_gpc.config import LogConfig
from megatron_gpc.errors import UserError
from megatron_gpc.metrics.sinks import check_sinks, make_sink, tag

CONFIG = {"seed": 3, "train": {"steps": 4}}


@pytest.fixture
def library(monkeypatch, tmp_path):
    """library(name): the library, far from home, its keys and its network."""

    def there(name):
        pytest.importorskip(name, reason=f"needs the extra: pip install 'megatron-gpc[{name}]'")
        for variable in [v for v in os.environ if v.startswith(("WANDB_", "SWANLAB_", "MLFLOW_"))]:
            monkeypatch.delenv(variable)
        monkeypatch.setenv("HOME", str(tmp_path))
        monkeypatch.chdir(tmp_path)

    return there


def run_twice(name, run_dir, **arguments):
    """A run that makes steps 1 to 3, and is continued from its checkpoint after step 2."""
    run_dir.mkdir(exist_ok=True)
    log = LogConfig(sinks=(name,), sinks_arguments={name: arguments})
    for resume_step, last, ok in ((0, 3, False), (2, 4, True)):
        sink = make_sink(log, name, run_dir, CONFIG, resume_step)
        for step in range(resume_step + 1, last + 1):
            sink.write(step, {"reward": float(step), "loss": math.nan, "seconds_train": math.inf})
        sink.write_evaluation(last, {"eval_reward": 0.5})
        sink.close(ok)


def test_tensorboard_has_grouped_tags_and_forgets_what_was_made_again(tmp_path):
    run_twice("tensorboard", tmp_path)
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    tags = {"reward/reward", "train/loss", "time/seconds_train", "eval/eval_reward"}
    assert set(events.Tags()["scalars"]) == tags
    shown = [(event.step, event.value) for event in events.Scalars("reward/reward")]
    assert shown == [(1, 1.0), (2, 2.0), (3, 3.0), (4, 4.0)]


def test_wandb_goes_on_with_the_same_page_offline_without_a_key(library, tmp_path):
    library("wandb")
    run_twice("wandb", tmp_path / "run", project="mine")
    page = json.loads((tmp_path / "run" / "pages.json").read_text())["wandb"]
    import wandb

    wandb.teardown()  # its process writes what is left
    written = list((tmp_path / "run" / "wandb").glob(f"offline-run-*-{page}/run-{page}.wandb"))
    assert len(written) in (1, 2), "one a start, by the second"
    for file in written:
        content = file.read_bytes()
        assert all(word in content for word in (b"reward/reward", b"eval/eval_reward", b"mine"))


def test_mlflow_goes_on_with_the_same_run_in_the_runs_folder(library, tmp_path):
    library("mlflow")
    pytest.importorskip("sqlalchemy", reason="pip install 'megatron-gpc[mlflow]'")
    run_twice("mlflow", tmp_path / "run", experiment="mine")
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{tmp_path}/run/mlflow.db")
    (run,) = client.search_runs([client.get_experiment_by_name("mine").experiment_id])
    assert run.info.run_id == json.loads((tmp_path / "run" / "pages.json").read_text())["mlflow"]
    assert (run.info.status, run.info.run_name) == ("FINISHED", "run")
    assert run.data.tags["config.train.steps"] == "4"
    history = client.get_metric_history(run.info.run_id, "reward/reward")
    assert {point.step: point.value for point in history} == {1: 1.0, 2: 2.0, 3: 3.0, 4: 4.0}
    assert run.data.metrics["eval/eval_reward"] == 0.5


def test_swanlab_goes_on_with_the_same_page_offline_without_a_key(library, tmp_path):
    library("swanlab")
    run_twice("swanlab", tmp_path / "run")
    page = json.loads((tmp_path / "run" / "pages.json").read_text())["swanlab"]
    written = list((tmp_path / "run" / "swanlab").glob(f"run-*-{page}/run-{page}.swanlab"))
    assert len(written) in (1, 2), "one a start, by the second"
    assert all(b"reward/reward" in file.read_bytes() for file in written)


@pytest.mark.parametrize("name", ["wandb", "mlflow", "swanlab"])
def test_a_library_that_is_missing_is_refused_with_its_extra(name, monkeypatch, tmp_path):
    (tmp_path / name).mkdir()  # as wandb leaves one: a folder of that name is no library
    monkeypatch.setattr("sys.path", [str(tmp_path)])
    monkeypatch.delitem(__import__("sys").modules, name, raising=False)
    says = rf"log.sinks: {name} is not installed here: pip install 'megatron-gpc\[{name}\]'"
    with pytest.raises(UserError, match=says):
        check_sinks(LogConfig(sinks=(name,)))


@pytest.mark.parametrize("name", ["wandb", "swanlab"])
def test_what_a_library_does_not_take_is_refused_at_the_start(name, monkeypatch, tmp_path):
    """Stands for the library: what it takes is all that is asked."""
    text = "def init(project=None, **others): raise SystemExit\n"
    (tmp_path / f"{name}.py").write_text(text.replace(", **others", ""))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, name, raising=False)
    check_sinks(LogConfig(sinks=(name,), sinks_arguments={name: {"project": "a"}}))
    with pytest.raises(UserError, match=rf"{name}.init takes .* argument 'projct'"):
        check_sinks(LogConfig(sinks=(name,), sinks_arguments={name: {"projct": "a"}}))
    monkeypatch.delitem(sys.modules, name)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("entropy", "entropy/entropy"),
        ("dh_predicted_e1", "entropy/dh_predicted_e1"),
        ("clip_fraction_low", "clip/clip_fraction_low"),
        ("groups_all_right", "reward/groups_all_right"),
        ("groups_asked", "rollout/groups_asked"),
        ("tokens_per_second", "time/tokens_per_second"),
        ("anything_else", "train/anything_else"),
    ],
)
def test_tags_are_grouped(name, expected):
    assert tag(name) == expected


OWN = """
class Own:
    def __init__(self, run_dir, config, resume_step, file="own.txt"):
        self.file = open(run_dir / file, "w")
    def write(self, step, values):
        print(step, values, file=self.file)
    def write_evaluation(self, step, values):
        print("eval", step, file=self.file)
    def close(self, ok):
        self.file.close()

def factory(run_dir, config, resume_step):
    return 3
"""


@pytest.mark.parametrize(
    ("change", "arguments", "says"),
    [
        (("", ""), {"fiel": "x"}, "unexpected keyword argument 'fiel'; what is passed by keyword"),
        (("def write(", "def wirte("), {}, "has no method write(step, values)"),
        (
            ("def write(self, step, values)", "def write(self, step)"),
            {},
            "Own.write takes (self",
        ),
        (("def close(self, ok)", "def close(self)"), {}, "Own.close takes (self)"),
        (("    def __init__(self, run_dir, config,", "    def __init__(self,"), {}, "too many"),
    ],
    ids=str,
)
def test_a_users_sink_that_cannot_work_is_refused_by_name(tmp_path, change, arguments, says):
    (tmp_path / "own.py").write_text(OWN.replace(*change))
    log = LogConfig(sinks=(f"{tmp_path}/own.py:Own",), sinks_arguments={"Own": arguments})
    with pytest.raises(UserError) as error:
        check_sinks(log)
    assert str(error.value).startswith("log.sinks: ") and says in str(error.value)
    assert "\n" not in str(error.value) and not (tmp_path / "own.txt").exists()


def test_what_a_users_factory_gives_is_looked_at_when_it_starts(tmp_path):
    (tmp_path / "own.py").write_text(OWN)
    log = LogConfig(sinks=(f"{tmp_path}/own.py:factory",))
    check_sinks(log)
    with pytest.raises(UserError, match="own.py:factory has no method write"):
        make_sink(log, log.sinks[0], tmp_path, CONFIG, 0)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"sinks": ("jsonl", "jsonl")}, "jsonl is named twice"),
        ({"sinks": ("wandbb",)}, "did you mean 'wandb'"),
        ({"sinks_arguments": {"wandb": {}}}, "sinks_arguments: wandb is none of the sinks"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(settings, says):
    with pytest.raises(ValueError, match=says):
        LogConfig(**settings)
