"""The configured verifier at work: a built-in one, or the user's own behind checks.

The user's function runs in one thread of its own, with an event loop if it is async.  It may fail,
hang or call exit(): the run then ends with an error that names verifier, prompt and answer, and
nothing else is left waiting.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import inspect
import math
import numbers
import reprlib
import threading
import time
from collections.abc import Callable, Coroutine, Iterable, Mapping, Sequence
from typing import Any, TypeVar

from megatron_gpc.config import DataConfig, parts
from megatron_gpc.errors import PartError, UserError
from megatron_gpc.rewards import VERIFIERS
from megatron_gpc.rewards.extraction import END_TOKENS
from megatron_gpc.types import LARGEST, Prompt, Verdict, is_usable

VERIFIER_KEY = "data.verifier"
MADE_UP = "The answer is 42."
"""What a user's verifier is tried out on."""
VERDICT_POLL_S = 0.05
ENDED = "it has ended the thread that it ran in"
_ELSEWHERE = (
    {"prompt", "prompts", "query", "queries", "question", "data_source", "args"},
    {"prompt", "prompts", "completion", "completions", "response", "solution_str", "text"},
)
"""Names that the first and the second parameter have where rewards are called otherwise (TRL, verl,
OpenRLHF, slime): what they name would be given something else here."""
_LISTS = {"texts", "completions", "responses", "answers", "solution_strs"}
SHOWN = 60
"""Characters of an answer's beginning and of its end that messages show."""

Answer = tuple[str, Prompt]
"""What the policy said, with the tokens that end it, and what it was asked."""

F = TypeVar("F", bound=Callable[..., Any])
T = TypeVar("T")


def batch(function: F) -> F:
    """Marks a verifier that takes lists (texts, labels, and prompts if it has a place for them) and
    returns a list; `function.batch = True` does the same."""
    function.batch = True  # type: ignore[attr-defined]
    return function


class Judge:
    """Judges answers by the configured verifier.

    Args:
        data: names it, and says what is right and how long it may take.
        special: the tokenizer's special tokens; built-in verifiers see nothing after the first.

    Raises:
        UserError: it cannot be imported, or called with (text, label[, prompt]) and the arguments.
    """

    def __init__(self, data: DataConfig, special: Sequence[str] = END_TOKENS):
        self.data, self.special = data, special
        self.own = data.verifier not in VERIFIERS
        if self.own:
            self._call = _Call(data)
            self.check_label = getattr(self._call.function, "check_label", lambda label: None)
            self._thread = _Thread(data)
            return
        arguments = data.verifier_arguments
        parts.check_call(
            VERIFIER_KEY, data.verifier, lambda text, label: None, ("text", "label"), arguments
        )
        self._built_in = VERIFIERS[data.verifier]
        self._built_in.require()
        self.check_label = self._built_in.check_label

    def __call__(self, answers: Sequence[Answer]) -> list[Verdict]:
        """A verdict for each answer, in their order; several threads may ask.

        Raises:
            PartError: the verifier failed, took too long, or gave what is no reward; names the
                prompt and the answer.
        """
        if self.own:
            return self._thread.run(self._all(answers)) if answers else []
        pairs = [(text, prompt.label) for text, prompt in answers]
        rewards = self._built_in(pairs, self.special)
        return [Verdict(reward, reward >= self.data.right_at) for reward in rewards]

    async def _all(self, answers: Sequence[Answer]) -> list[Verdict]:
        if self._call.batch:
            what = f"a batch of {len(answers)}, first {_shown(answers[0])}"
            found = await self._result(what, *zip(*answers, strict=True))
            with parts.blamed(VERIFIER_KEY, self.data.verifier, what):
                results = list(found) if isinstance(found, Iterable) else []
            if isinstance(found, str | Mapping) or len(results) != len(answers):
                raise self._wrong(what, found, f"expected a list of {len(answers)} results")
        elif self._call.is_async:
            asked = [self._result(_shown(a), *a) for a in answers]
            results = await asyncio.gather(*asked)
        else:
            results = [await self._result(_shown(a), *a) for a in answers]
        return [self._verdict(a, result) for a, result in zip(answers, results, strict=True)]

    async def _result(self, what: str, texts: Any, prompts: Any) -> Any:
        """What the user's function gives for one answer, or for a batch."""
        self._thread.begins(what)
        with parts.blamed(VERIFIER_KEY, self.data.verifier, what):
            limit = asyncio.timeout(self.data.verifier_timeout_s)
            try:
                async with limit:
                    found = self._call(texts, prompts)
                    return await found if inspect.isawaitable(found) else found
            except TimeoutError:
                if limit.expired():
                    raise TimeoutError(_late(self.data)) from None
                raise

    def _verdict(self, answer: Answer, result: Any) -> Verdict:
        values = result if isinstance(result, Mapping) else {"reward": result}
        if "reward" not in values:
            why = "expected a number, or a mapping with `reward`"
            raise self._wrong(_shown(answer), result, why)
        found = {}
        for name, value in values.items():
            with parts.blamed(VERIFIER_KEY, self.data.verifier, _shown(answer)):
                number = _number(value)
            if not isinstance(name, str) or number is None or not math.isfinite(number):
                raise self._wrong(_shown(answer), result, f"{name} is no finite number")
            if not is_usable(number):
                why = f"{name} is beyond {LARGEST:g}, the largest number whose square fp32 holds"
                raise self._wrong(_shown(answer), result, why)
            found[name] = number
        reward = found.pop("reward")
        right = bool(found.pop("right", reward >= self.data.right_at))
        return Verdict(reward, right, found)

    def _wrong(self, what: str, result: Any, why: str) -> PartError:
        gave = f"{self.data.verifier} gave {reprlib.repr(result)}"
        return PartError(f"{VERIFIER_KEY}: {gave} for {what}: {why}")


def check_verifier(data: DataConfig, *prompts: Prompt) -> None:
    """Refuse a verifier that cannot work; one of the user's own is tried on a made-up answer.

    Args:
        prompts: the first is what it is tried on, without any nothing is called; the labels of all
            of them are held to its `check_label`, if it has one.

    Raises:
        UserError: says what is wrong with it.
    """
    judge = Judge(data)
    if not prompts:
        return
    if judge.own:
        try:
            judge([(MADE_UP, prompts[0])])
        except PartError as error:
            raise UserError(" ".join(str(error).split())) from error
    for prompt in prompts:
        try:
            judge.check_label(prompt.label)
        except (Exception, SystemExit) as error:  # of whatever quality
            why = " ".join(str(error).split()) or type(error).__name__
            raise UserError(
                f"{prompt.place or f'prompt {prompt.index}'}: label {prompt.label!r:.80} can match "
                f"no answer: data.verifier={data.verifier}: {why}"
            ) from None


class _Call:
    """The user's function, called as its signature wants it."""

    def __init__(self, data: DataConfig):
        self.function = parts.find(VERIFIER_KEY, data.verifier, {})
        self.arguments = data.verifier_arguments
        self.batch = bool(getattr(self.function, "batch", False))
        self.is_async = any(
            map(inspect.iscoroutinefunction, (self.function, type(self.function).__call__))
        )
        names = ("texts", "labels", "prompts") if self.batch else ("text", "label", "prompt")
        _refuse_others_names(data.verifier, self.function, self.batch)
        self.prompt = _place_of_prompt(self.function, names[2], self.arguments)
        positional = names if self.prompt == "third" else names[:2]
        keywords = {names[2]: None} if self.prompt == "keyword" else {}
        given = keywords | self.arguments
        parts.check_call(VERIFIER_KEY, data.verifier, self.function, positional, given)
        self.keyword = names[2]

    def __call__(self, texts: Any, prompts: Any) -> Any:
        if self.batch:
            texts, prompts = list(texts), list(prompts)
            labels: Any = [prompt.label for prompt in prompts]
        else:
            labels = prompts.label
        if self.prompt == "third":
            return self.function(texts, labels, prompts, **self.arguments)
        if self.prompt == "keyword":
            return self.function(texts, labels, **{self.keyword: prompts}, **self.arguments)
        return self.function(texts, labels, **self.arguments)


def _refuse_others_names(verifier: str, function: Any, batch: bool) -> None:
    """Refuse a function whose parameters are named for other values than they would be given."""
    for parameter, elsewhere in zip(_parameters(function)[0], _ELSEWHERE, strict=False):
        lists = parameter.name in _LISTS and not batch
        if lists or parameter.name in elsewhere:
            mark = "; one that takes lists is marked with @batch" * lists
            raise UserError(
                f"{VERIFIER_KEY}: {verifier} takes {inspect.signature(function)}, but would be "
                f"given something else as {parameter.name}{mark}"
                f"{parts.wanted(VERIFIER_KEY, verifier)}"
            )


def _parameters(function: Any) -> tuple[list[inspect.Parameter], list[inspect.Parameter]]:
    """Those that can be given by place, and the others; none of a function that does not say."""
    try:
        found = list(inspect.signature(function).parameters.values())
    except (TypeError, ValueError):
        return [], []
    by_place = [p for p in found if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    return by_place, found[len(by_place) :]


def _place_of_prompt(function: Any, name: str, arguments: Mapping[str, Any]) -> str | None:
    """Where the function wants the prompt: `third`, as the `keyword` of that name, or nowhere."""
    by_place, others = _parameters(function)
    if len(by_place) > 2:
        third = by_place[2]
        required = third.default is third.empty and third.name not in arguments
        if third.name == name or required:
            return "third"
    named = any(p.name == name and p.kind is p.KEYWORD_ONLY for p in others)
    return "keyword" if named else None


class _Thread:
    """Runs the user's function in one thread, and gives up on it when it hangs."""

    def __init__(self, data: DataConfig):
        self._data, self._lock = data, threading.Lock()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._since, self._doing = time.monotonic(), ""

    def begins(self, what: str) -> None:
        """The function is called now."""
        self._since, self._doing = time.monotonic(), what

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Wait for it, up to the deadline of what runs.

        Raises:
            PartError: what runs takes too long, or has ended the thread.
        """
        with self._lock:  # one at a time: the user's function need not expect threads
            if self._loop is None:
                self._loop = asyncio.new_event_loop()
                run = self._loop.run_forever
                self._thread = threading.Thread(target=run, name="verifier", daemon=True)
                self._thread.start()
            self._since = time.monotonic()
            future = asyncio.run_coroutine_threadsafe(work, self._loop)
            while not concurrent.futures.wait([future], VERDICT_POLL_S).done:
                # The loop ends async functions at the deadline; this is for those that block it.
                waited = time.monotonic() - self._since
                if waited > self._data.verifier_timeout_s + 1 or not self._thread.is_alive():
                    self._loop = None  # whoever asks next gets another
                    where = f"{VERIFIER_KEY}: {self._data.verifier} for {self._doing}"
                    alive = self._thread.is_alive()
                    raise PartError(f"{where}: {_late(self._data) if alive else ENDED}")
            return future.result()


def _late(data: DataConfig) -> str:
    return f"no result after data.verifier_timeout_s={data.verifier_timeout_s:g}"


def _number(value: Any) -> float | None:
    """A number as a float, numpy's and tensors of one element included; None if it is none."""
    if not isinstance(value, numbers.Real) and getattr(value, "ndim", None) == 0:
        value = value.item()
    try:
        return float(value) if isinstance(value, numbers.Real) else None
    except OverflowError:  # a whole number
        return math.inf


def _shown(answer: Answer) -> str:
    text, prompt = answer
    if len(text) > 2 * SHOWN:
        text = f"{text[:SHOWN]} ... {text[-SHOWN:]}"
    return f"{prompt.place or f'prompt {prompt.index}'}, answer {text!r}"
