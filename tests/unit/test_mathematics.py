"""The verifier `math`: which answer it reads, what it holds equal, and that it always ends."""

from __future__ import annotations

import importlib.util
import os
import signal
import time

import pytest

from megatron_gpc.errors import UserError
from megatron_gpc.rewards import mathematics, verifier
from megatron_gpc.rewards.mathematics import Comparer, final_answer, verify


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"\boxed{1}, no: \boxed{\frac{1}{\sqrt{2}}} it is", r"\frac{1}{\sqrt{2}}"),
        ("Answer: 3\nso\nAnswer: $34$<|im_end|>", "34"),
        (r"Answer: 3, that is \boxed{4}", "4"),
        (r"\boxed{4}, but Answer: 3.", "3"),
        ("**Answer:** 12", "12"),
        (r"\boxed{cut off", None),
        ("34", None),
        ("", None),
    ],
)
def test_the_last_boxed_or_stated_answer_counts(text, answer):
    assert final_answer(text) == answer


@pytest.mark.parametrize(
    ("text", "label", "reward"),
    [
        (r"\boxed{\frac12}", "0.5", 1.0),
        (r"\boxed{x^2+1}", "1+x^2", 1.0),
        (r"\boxed{1,000}", 1000, 1.0),
        ("Answer: 34", 34, 1.0),
        ("Answer: 35", "34", 0.0),
        (r"\boxed{(1, 2]}", "[1, 2]", 0.0),
        (r"\boxed{\frac{1}{0}}", "1", 0.0),
        (r"\boxed{" + "1" * 1000 + "}", "1", 0.0),
    ],
)
def test_answers_are_compared_as_mathematics(text, label, reward):
    assert verify(text, label) == reward


def test_an_answer_that_never_comes_out_is_wrong_in_time_and_the_next_is_judged(monkeypatch):
    monkeypatch.setattr(mathematics, "DEADLINE_S", 1.0)
    begin = time.monotonic()
    assert verify(r"\boxed{9^{9^{9^{9}}}}", "3") == 0.0
    assert time.monotonic() - begin < 10
    assert verify(r"\boxed{\frac{6}{2}}", "3") == 1.0


def test_a_process_that_stopped_or_died_is_replaced(monkeypatch):
    comparer = Comparer()
    assert comparer.equal("1/2", "0.5")
    os.kill(comparer._process.pid, signal.SIGKILL)
    comparer._process.wait()
    assert comparer.equal("1/2", "0.5")
    monkeypatch.setattr(mathematics, "DEADLINE_S", 0.5)
    os.kill(comparer._process.pid, signal.SIGSTOP)
    assert not comparer.equal("1/2", "0.5"), "no answer in time"
    monkeypatch.undo()
    assert comparer.equal("1/2", "0.5")
    comparer.close()


def test_without_the_library_the_way_out_is_said(monkeypatch):
    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "math_verify" else real(name)
    )
    with pytest.raises(UserError, match=r"pip install 'megatron-gpc\[math\]'"):
        verifier("math")
