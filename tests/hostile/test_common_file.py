"""`common.pt` of a checkpoint may be well-formed, have its checksum, and be something else."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
from common_part import common
from hostile.outcomes import refused
from tiny import run_config
from unit.test_preflight import job, start  # noqa: F401 - fixtures

from megatron_gpc.algo.schedules import CheckedSchedule
from megatron_gpc.errors import UserError
from megatron_gpc.rollout.collector import Collector
from megatron_gpc.rollout.prefetch import Prefetch
from megatron_gpc.rollout.prompts import PromptSource
from megatron_gpc.run.files import SUMS, sha256
from megatron_gpc.types import Prompt
from megatron_gpc.weights.common_file import read_common
from megatron_gpc.weights.folders import COMMON


def changed(*path: str | int, to: object) -> Callable[[], object]:
    def change() -> object:
        whole: Any = common()
        inner = whole
        for key in path[:-1]:
            inner = inner[key]
        inner[path[-1]] = to
        return whole

    return change


FOREIGN: dict[str, Callable[[], object]] = {
    "a list": lambda: [1],
    "a tensor": lambda: torch.ones(3),
    "nothing": dict,
    "another trainer's": lambda: {"args": {}, "iteration": 3, "checkpoint_version": 3.0},
    "a key too many": changed("epoch", to=1),
    "optimizer: a list": changed("optimizer", to=[1]),
    "state: a list": changed("train_state", to=[]),
    "state: a field too many": changed("train_state", "epoch", to=1),
    **{f"step: {v!r:.9}": changed("train_state", "step", to=v) for v in (-1, "3", 1.5, True)},
    "sampling: a list": changed("train_state", "sampling", to=[]),
    "skipped: numbers": changed("train_state", "skipped", to=[1]),
    **{f"updates: {v!r:.9}": changed("updates", to=v) for v in (None, -1, "x", torch.ones(2))},
    "layout: a text": changed("layout", to="tp1"),
    "layout: without ranks": changed("layout", to={}),
    "generators: none": changed("generators", to=[]),
    "generators: numbers": changed("generators", to=[1]),
    **{
        f"{kind}: {v!r:.9}": changed("generators", 0, kind, to=v)
        for kind in ("python", "numpy", "torch", "tracker")
        for v in (None, 5, "x", [1], {"a": 1}, torch.ones(3))
    },
    "numpy: too few": changed("generators", 0, "numpy", "state", "key", to=[1]),
    "cuda: text": changed("generators", 0, "cuda", to="x"),
}


def test_what_a_run_writes_is_read(tmp_path):
    torch.save(common(), tmp_path / COMMON)
    assert read_common(tmp_path)["updates"] == 6


@pytest.mark.parametrize("name", FOREIGN)
def test_anything_else_is_refused(tmp_path, name):
    torch.save(FOREIGN[name](), tmp_path / COMMON)
    with pytest.raises(UserError, match="common.pt is not what a run saves there"):
        read_common(tmp_path)


@pytest.mark.parametrize("content", [b"", b"x", b"PK\x03\x04", b"\x80\x04N."])
def test_bytes_of_something_else_are_refused(tmp_path, content):
    (tmp_path / COMMON).write_bytes(content)
    with pytest.raises(UserError, match="common.pt is not what a run saves there"):
        read_common(tmp_path)


@pytest.mark.parametrize(
    "state",
    [
        {"source": 5},
        {"source": {"cursor": "x", "returned": []}, "unfinished": {}, "ahead": None},
        {"source": {"cursor": 1, "returned": [None]}, "unfinished": {}, "ahead": None},
        {
            "source": {"cursor": 1, "returned": []},
            "unfinished": {0: [{"x": 1}]},
            "ahead": None,
        },
        {"source": {"cursor": 1, "returned": []}, "unfinished": [], "ahead": None},
        {"source": {"cursor": 1, "returned": []}, "unfinished": {}, "ahead": 3},
        {"source": {"cursor": 1, "returned": []}, "unfinished": {}},
    ],
    ids=str,
)
def test_a_state_of_prompts_that_is_none_is_refused(tmp_path, start, state):  # noqa: F811
    config = run_config(tmp_path, start)
    source = PromptSource([Prompt(0, "1+1=", (49,), 2)], 0)
    collector = Collector(config, None, source, None, str, [])  # type: ignore[arg-type]
    with pytest.raises(UserError, match="state of prompts and samples is not one"):
        Prefetch(None, collector).restore(state)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("schedule", "state"),
    [
        ("od", {"s": "x", "initial_entropy": 1.0}),
        ("od", {"s": 0, "initial_entropy": float("nan")}),
        ("target", {"first": [1], "integral": 0.0, "clip_lambda": 0.0}),
    ],
)
def test_a_state_of_a_schedule_that_is_none_is_refused(tmp_path, start, schedule, state):  # noqa: F811
    clip = run_config(tmp_path, start, f"clip.schedule={schedule}", "clip.target=80%").clip
    with pytest.raises(UserError, match=f"the checkpoint's state of {schedule} is"):
        CheckedSchedule(clip, 10, state)


def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / COMMON)
    with pytest.raises(UserError, match="Not a regular file"):
        read_common(tmp_path)


@pytest.mark.parametrize("summed", [True, False])
def test_a_dry_run_refuses_it_unless_training_would_set_it_aside(job, capsys, summed):  # noqa: F811
    folder = job.run_dir / "checkpoints" / "step_000003"
    folder.mkdir(parents=True)
    torch.save([1], folder / COMMON)
    sums = sha256(folder / COMMON) if summed else "0" * 64
    (folder / SUMS).write_text(f"{sums}  {COMMON}\n")
    if summed:
        refused(capsys, str(folder), lambda: job.command("train", "--dry-run"))
    else:
        assert job.command("train", "--dry-run") == 0
