"""A user's verifier: the forms it may have, what it may give, and what ends the run."""

from __future__ import annotations

import threading
import time
import typing
from pathlib import Path

import pytest

from megatron_gpc.config import DataConfig
from megatron_gpc.errors import PartError, UserError
from megatron_gpc.rewards import VERIFIERS
from megatron_gpc.rewards.judging import Judge, check_verifier
from megatron_gpc.rollout.prompts import read_prompts
from megatron_gpc.types import Prompt, Verdict

PROMPT = Prompt(0, "1+1=", (1,), 2, None, {"level": 3}, "prompts.jsonl:7")


@pytest.fixture
def own(tmp_path):
    """own(text, **settings): the section `data` with the verifier `f` of a file of `text`."""

    def make(text, **settings):
        (tmp_path / "own.py").write_text("import asyncio, math, time\n" + text)
        verifier = f"{tmp_path}/own.py:f"
        return DataConfig(prompts=Path("p"), verifier=verifier, **settings)

    return make


@pytest.mark.parametrize(
    "text",
    [
        "def f(text, label): return text == str(label)",
        "def f(text, label, strict=True): return text == str(label)",
        "def f(text, label, prompt): return text == '2' and prompt.row['level'] == 3",
        "def f(text, label, *, prompt): return text == '2' and prompt.text == '1+1='",
        "def f(text, label, question): return text == '2' and question.messages is None",
        "def f(solution_str, ground_truth, extra_info=None): return solution_str == '2'",
        "def f(completions, answers): return [text == '2' for text in completions]\nf.batch = True",
        "async def f(text, label):\n    await asyncio.sleep(0)\n    return text == '2'",
        "def f(text, label): return {'reward': text == '2'}",
        "class F:\n    def __call__(self, text, label): return text == '2'\nf = F()",
        "class F:\n    async def __call__(self, text, label): return text == '2'\nf = F()",
        "def f(texts, labels): return [text == '2' for text in texts]\nf.batch = True",
        "from megatron_gpc.rewards.judging import batch\n@batch\n"
        "async def f(texts, labels, prompts): return [str(p.label) == t "
        "for t, p in zip(texts, prompts)]",
        "import numpy\ndef f(text, label): return numpy.float32(text == '2')",
        "import numpy\ndef f(texts, labels): return numpy.array([t == '2' for t in texts])\n"
        "f.batch = True",
    ],
)
def test_every_form_gives_a_verdict_for_each_answer_in_order(own, text):
    data = own(text)
    check_verifier(data, PROMPT)
    right, wrong = Verdict(1.0, True), Verdict(0.0, False)
    assert Judge(data)([("2", PROMPT), ("3", PROMPT), ("2", PROMPT)]) == [right, wrong, right]
    assert Judge(data)([]) == []


def test_arguments_are_passed_by_keyword(own):
    data = own(
        "def f(text, label, scale, prompt=None): return scale", verifier_arguments={"scale": 4}
    )
    assert Judge(data)([("", PROMPT)]) == [Verdict(4.0, True)]


@pytest.mark.parametrize(
    ("result", "verdict"),
    [
        ("0.5", Verdict(0.5, False)),
        ("1", Verdict(1.0, True)),
        ("{'reward': -2.5, 'right': True}", Verdict(-2.5, True)),
        ("{'reward': 3, 'right': 0}", Verdict(3.0, False)),
        (
            "{'reward': 1, 'format': 0.25, 'tries': 2}",
            Verdict(1.0, True, {"format": 0.25, "tries": 2}),
        ),
    ],
)
def test_results_become_verdicts(own, result, verdict):
    assert Judge(own(f"def f(text, label): return {result}"))([("", PROMPT)]) == [verdict]


def test_what_is_right_can_be_set(own):
    assert Judge(own("def f(text, label): return 0.5", right_at=0.5))([("", PROMPT)])[0].right
    data = DataConfig(prompts=Path("p"), verifier="addition", right_at=2.0)
    assert Judge(data)([("1+1$", PROMPT)]) == [Verdict(1.0, False)]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("def f(text, label): return math.nan", "gave nan for {}: reward is no finite number"),
        ("def f(text, label): return None", "gave None for {}: reward is no finite number"),
        ("def f(text, label): return math.inf", "gave inf for {}"),
        ("def f(text, label): return '1'", "gave '1' for {}"),
        ("def f(text, label): return 1e300", "gave 1e+300 for {}: reward is beyond 1e+18, the lar"),
        ("def f(text, label): return -10**19", "for {}: reward is beyond 1e+18"),
        ("def f(text, label): return 10**400", "for {}: reward is no finite number"),
        ("def f(text, label): return {'reward': 1, 'x': 2e18}", "for {}: x is beyond 1e+18"),
        (
            "class N:\n    def __repr__(self): raise ValueError\ndef f(text, label): return N()",
            "gave <N instance at",
        ),
        ("def f(text, label): return {'right': True}", "expected a number, or a mapping with `rew"),
        ("def f(text, label): return {'reward': 1, 'x': None}", "x is no finite number"),
        ("def f(text, label): return {'reward': 1, 'right': 'yes'}", "right is no finite number"),
        ("def f(text, label): 1 / 0", "failed at {}: ZeroDivisionError: division by zero ("),
        ("def f(text, label): raise TimeoutError('mine')", "failed at {}: TimeoutError: mine"),
        ("def f(text, label): exit(3)", "failed at {}: SystemExit: 3"),
        ("async def f(text, label): exit(3)", "failed at {}: SystemExit: 3"),
        ("import os\ndef f(text, label): os._exit(0)", "failed at {}: SystemExit: 0"),
        ("async def f(text, label): raise asyncio.CancelledError", "failed at {}: asyncio.exc"),
        ("def f(text, label): raise KeyboardInterrupt", "failed at {}: KeyboardInterrupt"),
        (
            "async def f(text, label):\n    asyncio.get_running_loop().stop()\n"
            "    await asyncio.sleep(9)",
            "has ended the thread that it ran in",
        ),
        (
            "class N(int):\n    def __float__(self): exit(0)\ndef f(text, label): return N()",
            "failed at {}: SystemExit: 0",
        ),
        ("def f(texts, labels):\n    yield exit(0)\nf.batch = True", "failed at a batch of 1"),
        ("def f(text, label): time.sleep(60)", "no result after data.verifier_timeout_s=0.2"),
        ("async def f(text, label): await asyncio.sleep(60)", "no result after data.verifier_tim"),
        ("def f(texts, labels): return [1, 2]\nf.batch = True", "expected a list of 1 results"),
        ("def f(texts, labels): return 1\nf.batch = True", "expected a list of 1 results"),
    ],
)
def test_what_is_no_reward_ends_the_run_by_name(own, text, says):
    data = own(text, verifier_timeout_s=0.2)
    answer = "x" * 500
    shown = f"prompts.jsonl:7, answer '{'x' * 60} ... {'x' * 60}'"
    begin = time.monotonic()
    with pytest.raises(PartError) as error:
        Judge(data)([(answer, PROMPT)])
    assert time.monotonic() - begin < 10
    said = str(error.value)
    assert said.startswith("data.verifier: ") and "own.py:f" in said
    assert says.format(shown) in said and ("batch" in text or shown in said)
    with pytest.raises(UserError) as refused:
        check_verifier(data, PROMPT)
    assert "answer 'The answer is 42.'" in str(refused.value) and "\n" not in str(refused.value)


def test_an_exception_keeps_its_traceback_and_the_next_call_works(own):
    judge = Judge(own("def f(text, label): return 1 / len(text)"))
    with pytest.raises(PartError, match=r"own.py, line 2\)$") as error:
        judge([("", PROMPT)])
    assert isinstance(error.value.__cause__, ZeroDivisionError)
    assert error.value.__cause__.__traceback__ is not None
    assert judge([("ab", PROMPT)])[0].reward == 0.5


def test_after_a_verifier_hung_others_are_judged(own):
    judge = Judge(own("def f(text, label): time.sleep(len(text))\n", verifier_timeout_s=0.1))
    with pytest.raises(PartError, match="no result"):
        judge([("x" * 30, PROMPT)])
    with pytest.raises(PartError, match="gave None"):
        judge([("", PROMPT)])


def test_one_thread_runs_the_users_function_whoever_asks(own):
    judge = Judge(own("import threading\ndef f(text, label): return threading.get_ident() % 1000"))
    found = []

    def ask():
        found.extend(judge([("", PROMPT)] * 3))

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert len(found) == 12 and len({verdict.reward for verdict in found}) == 1


def test_async_answers_are_judged_together(own):
    judge = Judge(own("async def f(text, label):\n    await asyncio.sleep(0.2)\n    return 1"))
    begin = time.monotonic()
    assert len(judge([("", PROMPT)] * 50)) == 50
    assert time.monotonic() - begin < 5


@pytest.mark.parametrize(
    ("text", "arguments", "says"),
    [
        ("def f(text): return 1", {}, "too many positional arguments"),
        ("def f(text, label): return 1", {"x": 1}, "unexpected keyword argument 'x'"),
        ("def f(text, label, *, scale): return 1", {}, "missing a required argument: 'scale'"),
        ("def f(text, label, prompt, more): return 1", {}, "missing a required argument: 'more'"),
        ("def f(completions, **kwargs): return [1.0]", {}, "something else as completions; one"),
        ("def f(prompts, completions, answer): return [1.0]", {}, "something else as prompts"),
        (
            "def f(*, completions, **kwargs): return [1.0]",
            {},
            "wanted is a function of .text, labe",
        ),
        (
            "def f(data_source, solution_str, ground_truth, extra_info=None): return 1.0",
            {},
            "would be given something else as data_source; wanted is a function of .text, label",
        ),
        ("def f(queries, prompts, labels): return 1.0", {}, "something else as queries"),
        ("async def f(args, sample, **kwargs): return 1.0", {}, "something else as args"),
        ("def f(texts, labels): return [1.0]", {}, "one that takes lists is marked with @batch"),
        ("def f(text, prompt): return 1.0", {}, "something else as prompt"),
        (
            "class F:\n    def __call__(self, completions, labels): return 1.0\nf = F()",
            {},
            "else as",
        ),
        ("f = 3", {}, "is 3, which cannot be called"),
        ("def g(): pass", {}, "has no 'f'"),
    ],
)
def test_functions_that_cannot_be_called_are_refused_without_a_prompt(own, text, arguments, says):
    with pytest.raises(UserError, match=says) as error:
        check_verifier(own(text, verifier_arguments=arguments))
    assert str(error.value).startswith("data.verifier: ")


def test_built_in_verifiers_are_those_the_key_names_and_take_no_arguments():
    (part,) = typing.get_type_hints(DataConfig, include_extras=True)["verifier"].__metadata__
    assert set(part.built_in) == set(VERIFIERS)
    data = DataConfig(prompts=Path("p"), verifier="addition", verifier_arguments={"x": 1})
    with pytest.raises(UserError, match="unexpected keyword argument 'x'"):
        check_verifier(data)


def test_a_prompt_knows_its_line_its_messages_and_every_other_field(tmp_path):
    file = tmp_path / "prompts.jsonl"
    file.write_text(
        '{"prompt": "a", "label": 1, "level": "hard", "tests": [1, 2]}\n\n'
        '{"prompt": [{"role": "user", "content": "b"}], "label": null}\n'
    )
    plain, chat = read_prompts(file, lambda texts: [[1] for _ in texts], lambda messages: "<b>")
    assert plain.row == {"level": "hard", "tests": [1, 2]} and plain.messages is None
    assert (chat.text, chat.messages) == ("<b>", [{"role": "user", "content": "b"}])
    assert [prompt.place for prompt in (plain, chat)] == [f"{file}:1", f"{file}:3"]
