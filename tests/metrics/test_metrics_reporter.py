"""One object for console and sinks: who may fail, who may hang, and who may not."""

from __future__ import annotations

import time

import pytest

from megatron_gpc.config.file import load
from megatron_gpc.errors import PartError, UserError
from megatron_gpc.metrics import reporter as reporters
from megatron_gpc.metrics.jsonl import read_metrics
from megatron_gpc.metrics.reporter import Reporter

OWN = """
import pathlib, time
class Own:
    def __init__(self, run_dir, config, resume_step, fail=(), hang=0):
        self.log = pathlib.Path(run_dir, "own.txt").open("a", buffering=1)
        self.fail, self.hang = fail, hang
        self.said(f"start after {resume_step} of {config['train']['steps']}")
        if "start" in fail:
            raise ConnectionError("no network")
    def said(self, text):
        print(text, file=self.log)
    def write(self, step, values):
        time.sleep(self.hang)
        if step in self.fail:
            raise ConnectionError("no network")
        self.said(f"{step}: {values['reward']}")
    def write_evaluation(self, step, values):
        self.said(f"evaluation {step}: {values['eval_reward']}")
    def close(self, ok):
        self.said(f"end, ok={ok}")
"""


@pytest.fixture
def configured(tmp_path):
    """configured(*overrides): a run whose sinks are metrics.jsonl and one of the user's own."""
    (tmp_path / "own.py").write_text(OWN)
    file = tmp_path / "config.yaml"
    file.write_text(
        "run_dir: run\nmodel: {hf: m}\ndata: {prompts: p, verifier: addition}\n"
        "train: {steps: 3}\nlog: {sinks: [jsonl, own.py:Own]}\n"
    )
    return lambda *overrides: load(file, overrides)


def report(config, resume_step=0, steps=(1, 2, 3)):
    with Reporter(config, resume_step) as reporter:
        for step in steps:
            reporter.step(step, {"reward": step / 4})
        reporter.evaluation(3, {"eval_reward": 0.5})


def said(config):
    return (config.run_dir / "own.txt").read_text().splitlines()


def test_every_sink_gets_everything_in_order(configured, capsys):
    config = configured()
    report(config)
    written = ["1: 0.25", "2: 0.5", "3: 0.75", "evaluation 3: 0.5"]
    assert said(config) == ["start after 0 of 3", *written, "end, ok=True"]
    assert [line["reward"] for line in read_metrics(config.run_dir)] == [0.25, 0.5, 0.75]
    assert read_metrics(config.run_dir, "eval.jsonl") == [{"step": 3, "eval_reward": 0.5}]
    assert len(capsys.readouterr().out.splitlines()) == 3


def test_a_run_that_fails_says_so_to_its_sinks(configured):
    config = configured()
    with pytest.raises(ZeroDivisionError):
        report(config, steps=(1, _Fails()))
    assert said(config)[-1] == "end, ok=False"


class _Fails:
    def __truediv__(self, _):
        raise ZeroDivisionError


def test_a_sink_that_fails_warns_once_and_the_run_goes_on(configured, capsys):
    config = configured("log.sinks_arguments.Own={fail: [1, 2]}")
    report(config)
    out = capsys.readouterr().out
    assert out.count("warning: ") == 1 and out.count("Traceback") == 1
    assert "own.py:Own failed at write(step=1): ConnectionError: no network (" in out
    assert said(config)[1:] == ["3: 0.75", "evaluation 3: 0.5", "end, ok=True"]
    assert len(read_metrics(config.run_dir)) == 3


def test_a_sink_that_hangs_holds_nobody_up(configured, capsys, monkeypatch):
    monkeypatch.setattr(reporters, "SINK_CLOSE_S", 0.2)
    config = configured("log.sinks_arguments.Own={hang: 30}")
    begin = time.monotonic()
    report(config)
    assert time.monotonic() - begin < 10
    assert "own.py:Own has not taken everything after 0.2 s" in capsys.readouterr().out
    assert len(read_metrics(config.run_dir)) == 3


def test_a_sink_that_cannot_start_is_refused_at_first_and_left_out_later(configured, capsys):
    config = configured("log.sinks_arguments.Own={fail: [start]}")
    with pytest.raises(PartError, match="own.py:Own failed at its start: ConnectionError: no netw"):
        Reporter(config, 0)
    report(config, resume_step=2, steps=(3,))
    assert "no network" in capsys.readouterr().out
    assert [line["step"] for line in read_metrics(config.run_dir)] == [3]


def test_metrics_that_cannot_be_written_end_the_run(configured):
    config = configured()
    (config.run_dir / "metrics.jsonl").mkdir(parents=True)
    with pytest.raises(UserError, match=r"metrics.jsonl: cannot be read: Is a directory"):
        Reporter(config, 2)


def test_a_disk_that_is_full_ends_the_run(configured):
    config = configured("log.sinks=[jsonl]")
    with pytest.raises(OSError, match="No space left"), Reporter(config, 0) as reporter:
        (written,) = reporter._direct
        written._steps = open("/dev/full", "w")  # noqa: SIM115 - the sink closes it
        reporter.step(1, {"reward": 0.5})


def test_keys_in_the_configuration_are_not_shown_to_sinks(configured, tmp_path):
    (tmp_path / "own.py").write_text(
        OWN.replace("start after", "{config['sglang']} {config['log']}")
    )
    config = configured(
        "sglang.environment={HF_TOKEN: secret}", "log.sinks_arguments.Own={hang: 0}"
    )
    report(config)
    assert "secret" not in said(config)[0] and "sinks_arguments" not in said(config)[0]
