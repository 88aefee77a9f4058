"""The files of examples/extend, which docs/extend.md shows."""

from __future__ import annotations

import math
import re
import shutil

import pytest
from commands import ROOT

from megatron_gpc.algo.losses import Objective
from megatron_gpc.algo.losses.check import made_up
from megatron_gpc.algo.schedules import CheckedSchedule, check_schedule
from megatron_gpc.config.file import load
from megatron_gpc.metrics.reporter import Reporter
from megatron_gpc.metrics.sinks import check_sinks
from megatron_gpc.rewards.judging import Judge, check_verifier
from megatron_gpc.types import Prompt, Verdict

EXAMPLES = sorted((ROOT / "examples" / "extend").glob("*.py"))


@pytest.fixture
def configured(tmp_path):
    """configured(text): the configuration in a folder with copies of the examples."""
    for file in EXAMPLES:
        shutil.copy(file, tmp_path)

    def make(text):
        file = tmp_path / "config.yaml"
        basis = "run_dir: run\nmodel: {hf: start}\ndata: {prompts: p.jsonl, verifier: addition}\n"
        file.write_text(basis + text)
        return load(file)

    return make


def section_of(name):
    """The lines of configuration that a file's docstring shows."""
    text = (ROOT / "examples" / "extend" / name).read_text()
    return re.search(r'^"""[^\n]*\n\n(.*?)^"""$', text, re.S | re.M)[1]


def test_the_document_shows_the_files_as_they_are():
    text = (ROOT / "docs" / "extend.md").read_text()
    shown = dict(
        re.findall(r"^examples/extend/(\w+\.py):\n\n```python\n(.*?)```$", text, re.S | re.M)
    )
    assert shown == {file.name: file.read_text() for file in EXAMPLES}


def test_the_loss_weighs_tokens_softly_and_keeps_every_gradient(configured):
    loss = Objective(configured(section_of("my_loss.py")))
    assert loss.metrics == ("loss_weight",)
    inputs = made_up(False)
    outputs = loss(inputs)
    outputs.loss_sum.backward()
    for log_ratio, adv, gradient in zip(
        (inputs.logp_T.detach() - inputs.streams.old_logp_T).tolist(),
        inputs.advantages_T.tolist(),
        inputs.logp_T.grad.tolist(),
        strict=True,
    ):
        weight = math.tanh(math.exp(log_ratio) / 2) / math.tanh(0.5)
        assert gradient == pytest.approx(-weight * adv, rel=1e-5)


def test_the_schedule_holds_the_entropy(configured):
    config = configured(section_of("schedule.py"))
    check_schedule(config.clip, config.train.steps)
    schedule = CheckedSchedule(config.clip, config.train.steps)
    assert schedule.bounds(0, 1.1).eps_high_at(0.0) == pytest.approx(0.5)
    assert schedule.bounds(1, 1.3).eps_high_at(0.0) == pytest.approx(0.2)
    assert schedule.bounds(1, 1.3).eps_low_at(0.0) == pytest.approx(0.3)


def test_the_sink_keeps_a_diary(configured):
    config = configured(section_of("sink.py"))
    check_sinks(config.log)
    with Reporter(config, 0) as reporter:
        reporter.step(1, {"reward": 0.25})
        reporter.evaluation(1, {"eval_reward": 0.5})
    assert (config.run_dir / "diary.txt").read_text().splitlines() == [
        "the run begins",
        "step 1 of 100: reward 0.250",
        "evaluated after step 1: reward 0.500",
        "the run has ended",
    ]


def test_the_reward_reads_the_last_number(configured, tmp_path):
    text = section_of("reward.py").replace("data:", "").strip().replace("\n  ", ", ")
    file = tmp_path / "config.yaml"
    file.write_text(f"run_dir: run\nmodel: {{hf: start}}\ndata: {{{text}}}\n")
    data = load(file).data
    prompt = Prompt(0, "1+1=", (1,), 2, row={"max_words": 1})
    check_verifier(data, prompt)
    assert Judge(data)([("so it is 2", prompt), ("3", prompt)]) == [
        Verdict(1 - 0.003, True, {"words": 3.0}),
        Verdict(0.0, False, {"words": 0.0}),
    ]
