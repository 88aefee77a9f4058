"""Compares answers for mathematics.py, a line of JSON each.

[gold, answer, deadline in seconds of CPU] -> true or false.

A first process imports sympy and forks a second one, which compares.  A comparison that hangs is
ended by an alarm signal: it kills the second process, whatever Python is doing there.  Then the
first one answers false and forks again, which takes milliseconds.  Both end when their input does.
"""

from __future__ import annotations

import gc
import json
import logging
import os
import re
import resource
import signal
from itertools import pairwise
from typing import Any

from math_verify import LatexExtractionConfig, parse, verify
from sympy import Eq, Expr, FiniteSet, Float, Interval, MatrixBase, Rational, Tuple

from megatron_gpc.rewards import literals, spelling
from megatron_gpc.run.child import die_with

PRACTICE = (
    (r"\frac{1}{2}", r"\dfrac{2}{4}"),
    (r"x^2+\sqrt{3}x", "x^{2}+2"),
    (r"(1, 2\pi]", r"\left(1, \frac{3\sqrt{5}}{4}\right]"),
)
"""Compared before the first fork: the parser learns its grammar as it goes, which takes 0.4 s."""
MEMORY_BYTES = 4 * 2**30
"""A power tower wants all there is."""
_LATEX = [LatexExtractionConfig(boxed_match_priority=0)]
_ASSIGNED = re.compile(
    r"(?:\\?[a-zA-Z]\w*(?:_\{?\w+\}?)?(?:\([a-z](?:,\s*[a-z])*\))?|\(\\?[a-z]+(?:,\s*\\?[a-z]+)+\))"
    r"\s*(?:=|\\(?:in|equiv)(?![a-z]))\s*"
)

_NEXT_ASSIGNED = re.compile(r"[,;]\s*\\?[a-zA-Z_{}0-9]+\s*=")
_NO_NUMBER = re.compile(r"^[\d.]+\s[\d\s.]+$|\d\s*_")
"""What math-verify takes for one number: 1 2 3, and 42_{41}."""
_MODULO = re.compile(r"\s*\\pmod\s*\{[^{}]*\}$")
_BASE = re.compile(r"(\w+)_\s*\{?\s*([2-9]|[12]\d|3[0-6])\s*\}?")
"""1101_2: a number in another base than ten."""
_BRACKETED = re.compile(r"(\\\{|[(\[])(.*)(\\\}|[)\]])")
_AND = re.compile(
    r",?\s*(?:\\text\s*\{\s*,?\s*(?:and|or)\s*\}|\b(?:and|or)\b|\\(?:lor|vee)(?![a-z]))"
)


def main() -> None:
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    logging.disable()  # what cannot be parsed is wrong, and not worth a line of log each
    for gold, answer in PRACTICE:
        same(gold, answer)
    gc.freeze()  # forks need not copy what was imported
    parent = os.getpid()
    reply("ready")
    while True:
        child = os.fork()
        if child == 0:
            die_with(parent)
            answer_requests()
            os._exit(0)
        if os.waitpid(child, 0)[1] == 0:
            return
        try:
            reply("false")  # the answer that it died of
        except BrokenPipeError:  # nobody is there to hear it
            return


def answer_requests() -> None:
    """Answer line by line until the input ends."""
    for line in iter(lambda: read_line(0), b""):
        gold, answer, deadline_s = json.loads(line)
        signal.setitimer(signal.ITIMER_PROF, deadline_s)
        equal = same(gold, answer)
        signal.setitimer(signal.ITIMER_PROF, 0)
        reply(json.dumps(bool(equal)))


def read_line(stream: int) -> bytes:
    """A line, and nothing of the next: that belongs to whoever is forked next."""
    line = b""
    while not line.endswith(b"\n"):
        piece = os.read(stream, 65536)  # one request is under way at a time
        if not piece:
            return b""
        line += piece
    return line


def reply(text: str) -> None:
    os.write(1, f"{text}\n".encode())


def same(gold: str, answer: str) -> bool:  # noqa: PLR0911
    """Whether an answer says what the label says."""
    gold, answer = spelling.tidy(gold), spelling.tidy(answer)
    if spelling.plain_text(gold) == spelling.plain_text(answer):
        return True
    if "ldots" in gold + answer or not answer:
        return False
    letter, chosen = literals.choice(gold), literals.choice(answer)
    if letter and not letter[1]:
        return bool(chosen) and letter[0] == chosen[0]
    if chosen and chosen[1] and not letter:
        answer = spelling.tidy(chosen[1])
    if "=" not in gold:
        answer = unassigned(answer if "\\pmod" in gold else _MODULO.sub("", answer))
        if "=" in answer and not re.search(r"(?<![\\a-zA-Z])[a-zA-Z]", answer):
            return all(same(gold, side) for side in answer.split("="))
    elif "=" not in answer:
        gold = unassigned(gold)
    gold_number, answer_number = literals.parse_number(gold), literals.parse_number(answer)
    if gold_number and answer_number:
        return literals.equal_numbers(gold_number, answer_number)
    gold_list, answer_list = listed(gold), listed(answer)
    ordered = [bool(found[0]) for found in (gold_list, answer_list) if found]
    if gold_list and answer_list and len({*ordered}) == 1 and "\\pm" not in gold + answer:
        return same_lists(gold_list, answer_list)
    words = literals.words(gold), literals.words(answer)
    if all(words):
        return words[0] == words[1]
    if any(words) and (gold_number or answer_number or (words[0] and answer.isalpha())):
        return False
    gold_base, answer_base = _BASE.fullmatch(gold), _BASE.fullmatch(answer)
    if gold_base and answer_base:
        return gold_base.groups() == answer_base.groups()
    if gold_base or answer_base:
        gold, answer = gold.split("_")[0], answer.split("_")[0]
        return spelling.squeezed(gold) == spelling.squeezed(answer)
    if literals.remarks(gold) != literals.remarks(answer) or _NO_NUMBER.search(answer):
        return False
    parsed = expressions(gold), expressions(answer)
    if not verify(*parsed, timeout_seconds=None, allow_set_relation_comp=True):
        return False
    return not apart(parsed[0][0], parsed[1][0])


def unassigned(text: str) -> str:
    """What stands to the right in `x = 5` and `x = f(y) = 5`; anything else as it is."""
    match = _ASSIGNED.match(text)
    if not match or _NEXT_ASSIGNED.search(_AND.sub(", ", text)):
        return text
    rest = text[match.end() :].strip()
    return rest.rpartition("=")[2].strip() if re.search(r"(?<![\\a-zA-Z])[a-zA-Z]", rest) else rest


def listed(text: str) -> tuple[str, list[str]] | None:
    r"""(brackets around, items) of a list, set or tuple of two or more; None for anything else.

    >>> listed(r"\{1, (2, 3)\}")
    ('', ['1', '(2, 3)'])
    """
    brackets = _BRACKETED.fullmatch(text)
    if brackets and all(_depths(brackets[2])):
        around, text = brackets[1] + brackets[3], brackets[2]
    else:
        around = ""
    text = _AND.sub(", ", re.sub(r"^\\text\s*\{([^{}]*)\}$", r"\1", text))
    if re.search(r",\s", text):
        text = re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", text)
    cuts = [i for i, depth in enumerate(_depths(text)) if depth == 1 and text[i] in ",;"]
    if not cuts or "\\begin" in text:
        return None
    items = [text[i + 1 : j].strip() for i, j in pairwise([-1, *cuts, len(text)])]
    return ("" if around == r"\{\}" else around), items


def _depths(text: str) -> list[int]:
    """At each character, 1 + how many brackets are open, once it is read."""
    depth = 1
    return [depth := depth + (c in "([{") - (c in ")]}") for c in text]


def same_lists(gold: tuple[str, list[str]], answer: tuple[str, list[str]]) -> bool:
    """Whether two lists have the same items: in order if they stand in ( ) or [ ]."""
    left = [*answer[1]]
    if gold[0] != answer[0] or len(gold[1]) != len(left):
        return False
    if gold[0]:
        return all(map(same, gold[1], left))
    for wanted in gold[1]:
        found = next((a for a in left if is_set(a) == is_set(wanted) and same(wanted, a)), None)
        if found is None:
            return False
        left.remove(found)
    return True


def is_set(text: str) -> bool:
    return text.startswith(r"\{")


def expressions(text: str) -> list:
    """As LaTeX, and the whole of it; its own deadlines, which raise in this thread, give way."""
    no_deadline: Any = None
    return parse(
        f"\\boxed{{{text}}}",
        _LATEX,
        fallback_mode="no_fallback",
        extraction_mode="first_match",
        parsing_timeout=no_deadline,
    )


def apart(gold: Any, answer: Any) -> bool:
    """Whether two expressions that math-verify holds equal differ in their values after all.

    It compares with an absolute precision, to which all small numbers are zero.
    """
    golds, answers = elements(gold), elements(answer)
    if len(golds) != len(answers):
        return False
    return any(far(g, a) for g, a in zip(golds, answers, strict=True))


def elements(value: Any) -> list:
    """The numbers or expressions that a set, tuple, matrix or interval holds."""
    if isinstance(value, Eq):
        return [value.rhs]
    if isinstance(value, Interval):
        return [value.start, value.end]
    if isinstance(value, MatrixBase):
        return value.flat()
    if isinstance(value, Tuple):
        return list(value.args)
    if isinstance(value, FiniteSet) and all(isinstance(item, Expr) for item in value.args):
        members: list[Any] = list(value.args)
        return sorted(
            members, key=lambda e: (str(e.evalf(20)) if not e.is_real else "", e.evalf(60))
        )
    return [value]


def far(gold: Any, answer: Any) -> bool:
    """Whether the values differ, at a made-up point where there are variables."""
    try:
        names = sorted({s.name for s in gold.free_symbols})
        if names != sorted({s.name for s in answer.free_symbols}):
            return False
        point = {name: Rational(137 + 31 * i, 100 + 7 * i) for i, name in enumerate(names)}
        g, a = (
            complex_of(e.subs({s: point[s.name] for s in e.free_symbols})) for e in (gold, answer)
        )
        rounded = gold.has(Float) or answer.has(Float)
        near = Rational(2, 10**6) * min(1, abs(g)) if rounded else abs(g) * Rational(1, 10**40)
        factors = [1, 100, Rational(1, 100)] if "1/100" in f"{gold!r} {answer!r}" else [1]
        return all(bool(abs(g - factor * a) > near * factor) for factor in factors)
    except (TypeError, ValueError, AttributeError, ArithmeticError):
        return False  # no number: nothing speaks against math-verify's word


def complex_of(expression: Any) -> Any:
    value = expression.doit().evalf(60)
    if not value.is_number or not value.is_finite:
        raise ValueError(expression)
    return value


if __name__ == "__main__":
    main()
