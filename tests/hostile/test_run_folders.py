"""Folders that are no run's, or hold what no run has: see test_inputs.py."""

from __future__ import annotations

import os

import pytest
from hostile.outcomes import refused, saying
from unit.test_preflight import job, start  # noqa: F401 - fixtures

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
