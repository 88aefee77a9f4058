from __future__ import annotations

import contextlib
import json
import math

import pytest
from damage import small_disk

from megatron_gpc.errors import UserError
from megatron_gpc.metrics.jsonl import JsonlSink, read_metrics


def _sink(run_dir, resume_step):
    return contextlib.closing(_Closes(run_dir, {}, resume_step))


class _Closes(JsonlSink):
    def close(self, ok=True):
        super().close(ok)


def _write(run_dir, resume_step, steps, value=0.5):
    with _sink(run_dir, resume_step) as sink:
        for step in steps:
            sink.write(step, {"reward": value})


def _steps(run_dir):
    return [line["step"] for line in read_metrics(run_dir)]


def test_a_line_is_one_object_with_the_step_first_in_full_precision_at_once(tmp_path):
    with _sink(tmp_path / "new" / "run", 0) as sink:
        sink.write(1, {"reward": 0.1 + 0.2, "weight_version": 8})
        text = (tmp_path / "new" / "run" / "metrics.jsonl").read_text()
        assert text == '{"step": 1, "reward": 0.30000000000000004, "weight_version": 8}\n'
        assert read_metrics(tmp_path / "new" / "run") == json.loads(f"[{text}]")


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1e300, -2e300])
def test_nan_and_infinity_are_strict_json_and_read_as_nan(tmp_path, value):
    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    _write(tmp_path, 0, [1], value)
    line = (tmp_path / "metrics.jsonl").read_text()
    assert json.loads(line, parse_constant=refuse) == {"step": 1, "reward": None}
    assert math.isnan(read_metrics(tmp_path)[0]["reward"])


def test_resuming_drops_the_steps_after_the_checkpoint_and_goes_on(tmp_path):
    _write(tmp_path, 0, [0, 1, 2, 3, 4])
    before = (tmp_path / "metrics.jsonl").read_text().splitlines()
    _write(tmp_path, 2, [3, 4, 5])
    assert _steps(tmp_path) == [0, 1, 2, 3, 4, 5]
    assert (tmp_path / "metrics.jsonl").read_text().splitlines()[:3] == before[:3]
    assert {file.name for file in tmp_path.iterdir()} == {"metrics.jsonl", "eval.jsonl"}


def test_resuming_at_the_last_step_keeps_everything(tmp_path):
    _write(tmp_path, 0, [0, 1, 2])
    _write(tmp_path, 2, [])
    assert _steps(tmp_path) == [0, 1, 2]


def test_resuming_after_k_steps_makes_the_evaluation_of_k_again(tmp_path):
    with _sink(tmp_path, 0) as sink:
        for step in (0, 2, 4):
            sink.write_evaluation(step, {"eval_reward": 0.5})
    with _sink(tmp_path, 2) as sink:
        sink.write_evaluation(2, {"eval_reward": 0.6})
    lines = read_metrics(tmp_path, "eval.jsonl")
    assert [(line["step"], line["eval_reward"]) for line in lines] == [(0, 0.5), (2, 0.6)]


@pytest.mark.parametrize("half", ['{"st', '{"step": 3, "reward": 0.', '{"step": 2'])
def test_a_half_written_last_line_is_left_out_and_dropped_on_resume(tmp_path, half):
    _write(tmp_path, 0, [1, 2])
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write(half)
    assert _steps(tmp_path) == [1, 2]
    _write(tmp_path, 2, [3])
    assert _steps(tmp_path) == [1, 2, 3]


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        ("{broken", "not a JSON object with a step"),
        ("[1]", "not a JSON object with a step"),
        ('{"reward": 1.0}', "not a JSON object with a step"),
        ('{"step": true}', "not a JSON object with a step"),
        ("", "not a JSON object with a step"),
        ('{"step": 2, "reward": "high"}', "reward is 'high', not a number"),
        ('{"step": 2, "reward": [1.0]}', "reward is .*, not a number"),
        ('{"step": 2, "reward": true}', "reward is True, not a number"),
    ],
)
def test_a_damaged_line_is_refused_by_its_number(tmp_path, damage, says):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n' + damage + '\n{"step": 3}\n')
    with pytest.raises(UserError, match=rf"metrics\.jsonl, line 2: {says}"):
        read_metrics(tmp_path)
    with pytest.raises(UserError, match="line 2"):
        JsonlSink(tmp_path, {}, 3)


def test_what_holds_no_metrics_is_refused(tmp_path):
    with pytest.raises(UserError, match="give the folder of a run"):
        read_metrics(tmp_path)
    (tmp_path / "metrics.jsonl").write_bytes(b"\x89PNG\xff\n")
    with pytest.raises(UserError, match=r"metrics\.jsonl: is not a text file"):
        read_metrics(tmp_path)


def test_a_full_disk_ends_a_write_and_closing_does_not_hide_it(tmp_path):
    sink = JsonlSink(tmp_path, {}, 0)
    sink.write(1, {"reward": 0.5})
    with small_disk(20), pytest.raises(OSError, match="File too large"):
        sink.write(2, {"reward": 0.5})
    with small_disk(20):
        sink.close(ok=False)
    _write(tmp_path, 1, [2])  # there is room again
    assert _steps(tmp_path) == [1, 2]
