"""The final answer of a response: where it stands, and what ends the response."""

from __future__ import annotations

import re
from collections.abc import Sequence

END_TOKENS = (
    "<|im_end|>",
    "<|im_start|>",
    "<|endoftext|>",
    "<|eot_id|>",
    "<|eom_id|>",
    "<|end_of_text|>",
    "<|end|>",
    "<｜end▁of▁sentence｜>",
    "<end_of_turn>",
    "<eos>",
    "</s>",
)
"""What ends a turn of common models, for text that comes without its tokenizer."""

INVISIBLE = dict.fromkeys(map(ord, "\u200b\u200c\u200d\u2060\u2061\u2062\u2063\ufeff\ufe0f"))
"""Characters of no width, for str.translate."""

_ANSWER = re.compile(
    r"(?:(?<![a-zA-Z])answers?|答案)[*_`\s]*[:：﹕]"
    r"|^[#*_ \t]*(?:#|\*\*|__)[#*_ \t]*(?:final )?answer[*_ \t]*\r?$",  # a heading
    re.IGNORECASE | re.MULTILINE,
)
_BOX = re.compile(r"\\f?box(?:ed)?\s*\{")
_DISPLAYED = re.compile(
    r"\$\$(.+?)\$\$|\\\[(.+?)\\\]|\\begin\{(?:equation|align|gather)\*?\}(.+?)\\end\{|```\w*\n(.+?)```",
    re.DOTALL,
)


def said(text: str, special: Sequence[str] = END_TOKENS) -> str:
    """The response up to its first special token; those that stand before any text are skipped.

    >>> said("<s>42</s>43", ["<s>", "</s>"])
    '42'
    """
    tokens = sorted(filter(None, special), key=len, reverse=True)
    if not tokens:
        return text
    pattern = re.compile("|".join(map(re.escape, tokens)))
    parts = (part for part in pattern.split(text) if part.strip())
    return next(parts, "")


def final_answer(text: str) -> str | None:
    r"""The last \boxed{...} or `Answer: ...`, whichever stands later; None if there is neither.

    >>> final_answer(r"so x = 2.  **Answer**: $2$")
    '2'
    >>> final_answer(r"\boxed{1} no, \boxed{\frac{1}{2}}")
    '\\frac{1}{2}'
    """
    text = text.translate(INVISIBLE)
    stated, begin = None, -1
    for match in _ANSWER.finditer(text):
        found = _stated(text[match.end() :])
        if found:
            stated, begin = found, match.start()
    boxes = [*_BOX.finditer(text)]
    if boxes and boxes[-1].start() > begin:
        boxed = braced(text, boxes[-1].end())
        if boxed is not None or stated is None:
            return boxed
    return stated


def _stated(rest: str) -> str:
    """What is said after `Answer:`: the first line that holds anything, or a displayed formula."""
    displayed = _DISPLAYED.match(rest.lstrip(" \t\r\n*_>#"))
    if displayed:
        return displayed[displayed.lastindex or 0].strip()
    rest = rest.lstrip(" \t\r\n\xa0*_`>#")
    line = re.split(r"[\r\n]", rest, maxsplit=1)[0]
    line = re.sub(r"\\[()\[\]]|\*\*|__|==|</?[a-z]+>|`", "", line)
    return (
        line.strip("*_\"'“” \t")
        .rstrip(".。")
        .replace("$", " " if r"\$" not in line else "$")
        .strip("* ")
    )


def braced(text: str, begin: int) -> str | None:
    """The text from `begin` to the brace that closes; None if none does."""
    depth, i = 1, begin
    while i < len(text):
        if text[i] == "\\":
            i += 1  # an escaped brace opens and closes nothing
        else:
            depth += {"{": 1, "}": -1}.get(text[i], 0)
            if depth == 0:
                return text[begin:i].strip()
        i += 1
    return None
