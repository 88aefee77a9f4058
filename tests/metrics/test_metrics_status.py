"""`megatron-gpc status`: what it says of runs, and of what is none."""

from __future__ import annotations

import json
import os
import time

import pytest

from megatron_gpc.errors import UserError
from megatron_gpc.metrics.status import first_traceback, status_lines
from megatron_gpc.run.lock import PREPARING, take


def _run(tmp_path, text="run_dir: r\nmodel: {hf: m}\ntrain: {steps: 10}\n"):
    (tmp_path / "config.yaml").write_text(text)
    return tmp_path


def _error(folder, rank, timestamp, words):
    folder.mkdir(parents=True, exist_ok=True)
    information = {"py_callstack": words, "timestamp": str(timestamp)}
    message = {"message": {"message": words, "extraInfo": information}}
    (folder / f"rank_{rank}.error.json").write_text(json.dumps(message))


def test_progress_checkpoints_and_the_lead_of_a_time_limit(tmp_path):
    run = _run(tmp_path)
    lines = [
        {"step": step, "seconds_train": 40.0, "seconds_rollout": 10.0 * step, **saved}
        for step, saved in ((1, {}), (2, {"seconds_checkpoint": 30.0}))
    ]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for name in ("step_000002", "step_000001.damaged", "step_000002.part"):
        (run / "checkpoints" / name).mkdir(parents=True)
    said = status_lines(run, lead_s=149.0)
    assert said[0].startswith(f"{run}: step 2 of 10, ")
    assert "newest checkpoint: step_000002" in said
    assert "damaged, set aside: step_000001.damaged" in said
    assert said[-1].endswith("= 150 s: NOT ENOUGH: raise T in --signal=B:USR1@T")
    assert status_lines(run, lead_s=150.0)[-1].endswith("150 s: enough")


@pytest.mark.parametrize("text", ["", "a: [", "train: {steps: 3}", "\x00", "- 1", "train: 3"])
def test_what_is_no_run_is_refused(tmp_path, text):
    with pytest.raises(UserError, match="not the folder of a run"):
        status_lines(_run(tmp_path, text), None)


def test_the_first_traceback_of_the_newest_attempt_is_shown(tmp_path):
    _error(tmp_path / "attempts" / "7.0" / "logs_before", 0, 5, "older")
    _error(tmp_path / "logs", 1, 10, "first")
    _error(tmp_path / "logs", 2, 11, "second")
    (tmp_path / "logs" / "rank_3.error.json").write_text('{"mess')
    assert first_traceback(tmp_path).endswith("rank_1.error.json:\nfirst")
    with pytest.raises(UserError, match="no rank left a traceback"):
        first_traceback(tmp_path / "attempts" / "none")


def test_a_run_that_is_starting_has_no_step_yet(tmp_path):
    with take(tmp_path, PREPARING):
        said = status_lines(tmp_path, None)
    assert said[0] == f"{tmp_path}: no step yet"
    assert said[1].startswith(f"it is starting, or ending: process {os.getpid()} on ")
    with pytest.raises(UserError, match=r"not the folder of a run: .*config.yaml"):
        status_lines(tmp_path / "none", None)


def test_a_configuration_s_folder_is_told_where_its_runs_are(tmp_path):
    with pytest.raises(UserError, match="none has begun here; .* run_dir there names, r$"):
        status_lines(_run(tmp_path), None)


def test_an_error_is_shown_that_the_newest_attempt_ended_by(tmp_path):
    run = _run(tmp_path)
    take(run).close()
    _error(run / "logs", 1, time.time() - 60, "ValueError: of the attempt before")
    assert not any(line.startswith("ended by") for line in status_lines(run, None))
    _error(run / "logs", 1, time.time() + 1, "PartError: my_reward.py: 1/0\nmore\n")
    (said,) = [one for one in status_lines(run, None) if one.startswith("ended by")]
    assert said == "ended by an error: PartError: my_reward.py: 1/0; --traceback shows where"
