"""The verifier `math`: which answer it reads, what it holds equal, and that it always ends."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import time
from pathlib import Path

import pytest

from megatron_gpc.config import DataConfig
from megatron_gpc.errors import UserError
from megatron_gpc.rewards import VERIFIERS, mathematics
from megatron_gpc.rewards.extraction import final_answer, said
from megatron_gpc.rewards.judging import Judge
from megatron_gpc.rewards.mathematics import Comparer, Pool, verify_all


def verify(text, label):
    return verify_all([(text, label)])[0]


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"\boxed{1}, no: \boxed{\frac{1}{\sqrt{2}}} it is", r"\frac{1}{\sqrt{2}}"),
        ("Answer: 3\nso\nAnswer: $34$", "34"),
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


SPELLED = {
    "42": [r"\boxed{\color{red}{42}}", r"\boxed{\underline{\underline{42}}}", r"\boxed{= 42}",
           r"\boxed{42,}", r"\boxed{\text{(B) }42}", r"\boxed{42\text{ m/s}}",
           r"\boxed{\text{42 cm}}",
           "## Answer\n\n**42**", "Answer:\n```text\n42\n```", "Answer:\u200b42。", "答案：42"],
    "1,2": [r"\boxed{x=1\text{ or }x=2}", r"\boxed{\{2, 1\}}", r"\boxed{\text{1 and 2}}"],
    "(3,4),(4,3)": [r"\boxed{(4,3)\text{ and }(3,4)}", r"\boxed{(x,y)=(4,3),(3,4)}"],
    "12345678": [r"\boxed{12 345 678}"],
    r"\frac13": [r"\boxed{0.\bar3}", r"\boxed{0.33333333}"],
}  # fmt: skip
MISREAD = {
    "42": [r"\boxed{42.0000001}", r"\boxed{41=42}", r"\boxed{42_{41}}", r"\boxed{42n}",
           r"\boxed{42\text{ feet }6\text{ inches}}", r"\boxed{42\text{ squared}}"],
    "1.0000002": [r"\boxed{1.0000001}", r"\boxed{1.000000}"],
    "1,2,2": [r"\boxed{1,1,2}"],
    r"\{1,2,3\}": [r"\boxed{\{1\},\{2\},\{3\}}"],
    "B": [r"\boxed{A = B}", r"\boxed{b}", r"\boxed{\text{(B) or (C)}}"],
    r"5\text{ cm}": [r"\boxed{5\%}"],
    "yes": [r"\boxed{sye}"],
}  # fmt: skip


@pytest.mark.parametrize(("table", "reward"), [(SPELLED, 1.0), (MISREAD, 0.0)])
def test_an_answer_is_read_as_it_is_meant(table, reward):
    pairs = [(text, label) for label, texts in table.items() for text in texts]
    judged = zip(pairs, verify_all(pairs), strict=True)
    assert not [pair for pair, got in judged if got != reward]


def test_an_answer_that_never_comes_out_is_wrong_in_time_and_the_next_is_judged(monkeypatch):
    monkeypatch.setattr(mathematics, "DEADLINE_S", 1.0)
    begin = time.monotonic()
    assert verify(r"\boxed{9^{9^{9^{9}}}}", "3") == 0.0
    assert time.monotonic() - begin < 60
    assert verify(r"\boxed{\frac{6}{2}}", "3") == 1.0


def test_a_process_that_stopped_or_died_is_replaced(monkeypatch):
    comparer = Comparer()
    assert comparer.equal("1/2", "0.5")
    os.kill(comparer._process.pid, signal.SIGKILL)
    comparer._process.wait()
    assert comparer.equal("1/2", "0.5")
    monkeypatch.setattr(mathematics, "DEADLINE_S", 0.1)
    os.killpg(comparer._process.pid, signal.SIGSTOP)
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
        Judge(DataConfig(prompts=Path("p"), verifier="math"))


PAIRS = Path(__file__).with_name("mathematics_pairs.jsonl")
"""Labels with right and wrong responses, a kind a line; `misjudged` are the errors."""


@pytest.mark.slow
def test_the_confusion_matrix_of_the_labelled_pairs_is_the_documented_one():
    kinds = [json.loads(line) for line in PAIRS.read_text("utf-8").splitlines()]
    cases = [
        (kind["kind"], text, kind["label"], wanted)
        for kind in kinds
        for name, wanted in (("right", 1.0), ("wrong", 0.0))
        for text in kind[name]
    ]
    judged = verify_all([(text, label) for _, text, label, _ in cases])
    matrix = {pair: 0 for pair in ((1.0, 1.0), (1.0, 0.0), (0.0, 1.0), (0.0, 0.0))}
    known = {(kind["label"], text) for kind in kinds for text in kind.get("misjudged", ())}
    errors = set()
    for (kind, text, label, wanted), got in zip(cases, judged, strict=True):
        matrix[wanted, got] += 1
        if got != wanted:
            errors.add((label, text))
            print(f"{kind}: {text[:60]!r} for {label!r} is judged {got:g}")
    print("              judged right  judged wrong")
    for wanted, name in ((1.0, "right"), (0.0, "wrong")):
        print(f"really {name}  {matrix[wanted, 1.0]:12}  {matrix[wanted, 0.0]:12}")
    assert len(cases) >= 300 and errors == known


def test_hung_answers_are_judged_beside_each_other_and_the_order_is_kept(monkeypatch):
    monkeypatch.setattr(mathematics, "DEADLINE_S", 0.5)
    pool = Pool(2)
    monkeypatch.setattr(mathematics, "_POOL", pool)
    hung = [(rf"\boxed{{9^{{9^{{9^{{{i}}}}}}}}}", "3") for i in range(9, 12)]
    assert verify_all([*hung, (r"\boxed{6/2}", "3"), hung[0]]) == [0, 0, 0, 1, 0]
    assert verify_all([(rf"\boxed{{{i}/2}}", "0.5") for i in range(8)]) == [0, 1, *[0] * 6]
    pids = [comparer._process.pid for comparer in pool._all]
    assert len({*pids}) == 2, "both were used"
    pool.close()
    assert not any(os.path.exists(f"/proc/{pid}") for pid in pids), "no zombie is left"


def test_the_answer_ends_with_the_first_special_token_of_the_tokenizer():
    pairs = [
        ("[START]Answer: 42[END]Answer: 43", 42),
        ("Answer: 43[END]Answer: 42", 42),
        ("Answer: 1[END]", 1),
        ("Answer: 2<|x|>", 1),
    ]
    assert VERIFIERS["math"](pairs, ["<|x|>", "[END]", "[START]"]) == [1.0, 0.0, 1.0, 0.0]
    assert said("[END]", ["[END]"]) == ""
    assert VERIFIERS["addition"]([("1+2$", 3)], ["$"]) == [1.0], "its answers end with it"
