"""Folders that are no run's, or hold what no run has: see test_inputs.py."""

from __future__ import annotations

import os

import pytest
from hostile.outcomes import CONFIG, refused, saying
from unit.test_preflight import job, start  # noqa: F401 - fixtures

from megatron_gpc.cli import main

FOLDERS = {
    "resume=none of a folder of one's own": (
        lambda j: j.overrides.extend([f"run_dir={j.folder}", "resume=none"]),
        "is no run's folder, and resume=none would rename it",
    ),
    "resume=none of /": (saying("run_dir=/", "resume=none"), "/ is no run's folder"),
    "resume=none, with the prompts in it": (
        lambda j: (
            j.run_dir.mkdir(),
            (j.run_dir / "lock").touch(),
            (j.run_dir / "p").write_bytes(j.prompts.read_bytes()),
            j.overrides.extend([f"data.prompts={j.run_dir / 'p'}", "resume=none"]),
        ),
        "resume=none would set aside data.prompts=",
    ),
    "the folder of the configuration": (
        lambda j: j.overrides.append(f"run_dir={j.folder}"),
        "config.yaml is no run's, and would be replaced by one",
    ),
    **{
        f"a link as {name}": (
            lambda j, name=name: (
                (j.run_dir / "checkpoints").mkdir(parents=True),
                (j.run_dir / name).symlink_to("../prompts.jsonl"),
            ),
            f"{name} is a link, where a run has a file",
        )
        for name in ("lock", "launch.lock", "metrics.jsonl", "eval.jsonl", "config.yaml")
    },
    "a link without an end as metrics.jsonl": (
        lambda j: (j.run_dir.mkdir(), (j.run_dir / "metrics.jsonl").symlink_to("metrics.jsonl")),
        "metrics.jsonl is a link",
    ),
}


@pytest.mark.parametrize("entrance", [("train", "--dry-run"), ("train",)])
@pytest.mark.parametrize("name", FOLDERS)
def test_no_folder_or_file_of_anyone_elses_is_renamed_or_replaced(job, capsys, name, entrance):  # noqa: F811
    change, says = FOLDERS[name]
    change(job)
    before = {file: os.lstat(file).st_mtime_ns for file in job.folder.rglob("*")}
    refused(capsys, says, lambda: job.command(*entrance))
    after = {file: os.lstat(file).st_mtime_ns for file in job.folder.rglob("*")}
    assert {f: t for f, t in after.items() if not f.is_dir()} == {
        f: t for f, t in before.items() if not f.is_dir()
    }


ODD = {
    "a pipe": os.mkfifo,
    "a link to a device": lambda file: file.symlink_to("/dev/zero"),
    "a link to itself": lambda file: file.symlink_to(file.name),
    "a link to nothing": lambda file: file.symlink_to("nowhere"),
    "a folder": lambda file: file.mkdir(),
    "endless": lambda file: (file.touch(), os.truncate(file, 2**33)),
}


@pytest.mark.parametrize("command", ["status", "plot"])
@pytest.mark.parametrize("name", ODD)
def test_metrics_that_are_no_file_of_numbers_are_refused(tmp_path, capsys, name, command):
    (tmp_path / "config.yaml").write_text(CONFIG)
    ODD[name](tmp_path / "metrics.jsonl")
    (tmp_path / "checkpoints").mkdir()
    if command == "plot" or (tmp_path / "metrics.jsonl").exists():  # else there is no step yet
        refused(capsys, "metrics.jsonl: ", lambda: main([command, str(tmp_path)]))


@pytest.mark.parametrize("file", ["lock", "launch.lock", "eval.jsonl", "rank_0.error.json"])
@pytest.mark.parametrize("name", ODD)
def test_status_waits_for_nothing_in_a_runs_folder(tmp_path, capsys, name, file):
    (tmp_path / "config.yaml").write_text(CONFIG)
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 1.0}\n')
    ODD[name](tmp_path / file)
    assert main(["status", str(tmp_path)]) == 0
    assert "step 1 of 3" in capsys.readouterr().out
