"""Configuration: files, overrides, and what is refused."""

from __future__ import annotations

import dataclasses
import sys

import pytest

from megatron_gpc.config import Config
from megatron_gpc.config.file import dump, keys, load
from megatron_gpc.errors import UserError

MINIMAL = "run_dir: runs/x\nmodel: {hf: start}\ndata: {prompts: p.jsonl, verifier: addition}\n"


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(MINIMAL)
    return path


def test_the_names_that_scripts_rely_on_exist():
    assert {
        "run_dir",
        "seed",
        "resume",
        "parallel.tp",
        "parallel.pp",
        "parallel.vpp",
        "parallel.cp",
        "parallel.ep",
        "parallel.dp",
        "parallel.sequence_parallel",
        "train.steps",
        "train.micro_batch_size",
        "clip.schedule",
        "clip.eps_low",
        "clip.eps_high",
        "clip.phase_split",
        "clip.hi_slope",
        "clip.hi_intercept",
        "clip.lo_slope",
        "clip.lo_intercept",
    } <= set(keys())


def test_overrides_win_and_keep_their_types(file):
    config = load(
        file,
        [
            "clip.schedule=did",
            "optim.lr=1e-4",
            "parallel.sequence_parallel=true",
            "parallel.tp=2",
            "megatron.transformer.recompute_granularity=full",
        ],
    )
    assert config.clip.schedule == "did" and config.optim.lr == 1e-4
    assert config.parallel.sequence_parallel is True
    assert config.megatron.transformer == {"recompute_granularity": "full"}


def test_fields_of_a_mapping_add_up_and_an_empty_one_empties_it(file):
    file.write_text(file.read_text() + "clip: {schedule_arguments: {rate: 2, from: 1}}\n")
    arguments = "clip.schedule_arguments"
    assert load(file, [f"{arguments}.rate=3"]).clip.schedule_arguments == {"rate": 3, "from": 1}
    assert load(file, [f"{arguments}={{}}"]).clip.schedule_arguments == {}
    given = [f"{arguments}={{}}", f"{arguments}.rate=4"]
    assert load(file, given).clip.schedule_arguments == {"rate": 4}
    above = file.with_name("above.yaml")
    above.write_text(f"extends: {file.name}\nclip: {{schedule_arguments: {{}}}}\n")
    assert load(above).clip.schedule_arguments == {}


def test_dump_and_load_give_the_same_configuration(file, tmp_path):
    url = "rollout.server.urls=http://localhost:30000"
    config = load(file, ["clip.phase_split=0.3", "seed=7", url])
    assert config.rollout.server.urls == ("http://localhost:30000",)
    again = tmp_path / "elsewhere" / "config.yaml"
    again.parent.mkdir()
    again.write_text(dump(config))
    assert load(again) == config


def test_paths_of_the_file_are_relative_to_it_and_overrides_to_the_folder(
    file, tmp_path, monkeypatch
):
    other = tmp_path / "other"
    other.mkdir()
    monkeypatch.chdir(other)
    config = load(file, ["run_dir=here"])
    assert config.model.hf == tmp_path / "start"
    assert config.run_dir == other / "here"


def test_files_of_own_parts_are_paths_too(file, tmp_path, monkeypatch):
    own = "{schedule: mine/clip.py:Steep, schedule_arguments: {rate: 2}}"
    file.write_text(file.read_text() + f"clip: {own}\n")
    monkeypatch.chdir(tmp_path.parent)
    config = load(file)
    assert config.clip.schedule == f"{tmp_path}/mine/clip.py:Steep"
    assert config.clip.schedule_arguments == {"rate": 2}
    assert load(file, ["clip.schedule=a.py:B.c"]).clip.schedule == f"{tmp_path.parent}/a.py:B.c"
    assert load(file, ["clip.schedule=pack.module:f"]).clip.schedule == "pack.module:f"
    assert load(file, ["clip.schedule_arguments.rate=3"]).clip.schedule_arguments == {"rate": 3}
    again = tmp_path / "run" / "config.yaml"
    again.parent.mkdir()
    again.write_text(dump(config))
    assert load(again) == config


def test_an_environments_interpreter_stays_its_own(file, tmp_path):
    """It is a link to the one that the environment was made with."""
    python = tmp_path / "env" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.symlink_to(sys.executable)
    assert load(file, [f"sglang.python={python.parent}/../bin/python"]).sglang.python == python


def test_configuration_cannot_be_changed(file):
    with pytest.raises(dataclasses.FrozenInstanceError):
        load(file).seed = 3


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("clip.shedule=id", "'clip.shedule'; did you mean 'clip.schedule'"),
        ("eps_low=0.1", "did you mean 'clip.eps_low'"),
        (
            "clip.schedule=foo",
            "clip.schedule: expected static, hi, lo, id, did, od, target, or a part of your own as "
            "package.module:name or path/to/file.py:name, got 'foo'",
        ),
        ("clip.schedule=statik", "clip.schedule: did you mean 'static'? expected static, hi, lo"),
        ("clip.schedule=mine.py", "which part of the file? expected mine.py:NAME"),
        ("clip.schedule=mine.py:1", "clip.schedule: expected static"),
        ("clip.schedule=my-package:f", "clip.schedule: expected static"),
        ("clip.schedule_arguments=3", "clip.schedule_arguments: input should be a valid dict"),
        ("parallel.tp=0", "parallel.tp: input should be greater than or equal to 1"),
        ("parallel.tp=two", "parallel.tp: input should be a valid integer"),
        ("parallel=2", "parallel is a section"),
        ("optim.lr=.nan", "optim.lr: input should be a finite number"),
        ("clip.phase_split=1", "clip.phase_split: input should be less than 1"),
        ("clip.regions=[e1, e5]", "clip.regions.1: input should be 'e1', 'e2', 'e3' or 'e4'"),
        ("clip.regions=[]", "clip.regions: name at least one"),
        ("rollout.group_size=1", "rollout.group_size"),
        ("seed", "expected key=value"),
        ("frobnicate=1", "unknown key 'frobnicate'; all keys are in config/schema.py"),
        ("rollout.server.urls=a:1", "server.urls=a:1': rollout.server.urls.0: expected an"),
        ("rollout.server.urls=[http://a, http://]", "rollout.server.urls.1: expected an address"),
    ],
)
def test_bad_overrides_are_refused_by_name(file, override, says):
    with pytest.raises(UserError) as error:
        load(file, [override])
    assert says in str(error.value)
    assert f"override '{override}'" in str(error.value) and str(file) not in str(error.value)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("- a\n", "expected a mapping"),
        ("a: [", "not valid YAML"),
        ("? [a]\n: b\n", "not valid YAML"),
        ("run_dir: x\n", "model.hf: is required"),
        (MINIMAL + "clip: 3\n", "clip is a section"),
        (MINIMAL + "seed: 1\nseed: 2\n", "'seed' is given twice"),
        (MINIMAL + "train:\n  steps: 1\n  steps: 2\n", "'steps' is given twice"),
    ],
)
def test_bad_files_are_refused(file, text, says):
    file.write_text(text)
    with pytest.raises(UserError) as error:
        load(file)
    assert says in str(error.value) and str(file) in str(error.value)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(UserError, match="nowhere.yaml"):
        load(tmp_path / "nowhere.yaml")


def test_every_key_is_documented():
    def undocumented(section, prefix=""):
        for name, field in section.__pydantic_fields__.items():
            kind = field.annotation
            if dataclasses.is_dataclass(kind):
                assert kind.__doc__
                yield from undocumented(kind, f"{prefix}{name}.")
            elif not field.description and name not in (
                "hf",
                "beta1",
                "beta2",
                "eps",
                "weight_decay",
            ):
                yield prefix + name

    assert list(undocumented(Config)) == []
