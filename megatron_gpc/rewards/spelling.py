"""One way of writing for what LaTeX, Unicode and Markdown write in many."""

from __future__ import annotations

import re
import unicodedata

from megatron_gpc.rewards.extraction import INVISIBLE, braced

_SUPERSCRIPTS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁻⁺", "0123456789-+")
_SIGNS = {
    "−": "-", "–": "-", "×": r"\times ", "·": r"\cdot ", "÷": "/", "π": r"\pi ", "∞": r"\infty ",
    "≤": r"\le ", "≥": r"\ge ", "≠": r"\ne ", "±": r"\pm ", "∪": r"\cup ", "√": r"\sqrt ",
    "…": r"\ldots ", "°": r"^{\circ}", "≈": r"\approx ", "∈": r"\in ", "∅": r"\emptyset ",
    "θ": r"\theta ", "α": r"\alpha ", "β": r"\beta ", "Ω": r"\Omega ", "。": ".", "、": ", ", 
    "′": "'", "“": '"', "”": '"',
}  # fmt: skip
_SAME = [(re.compile(pattern), same) for pattern, same in [
    (r"\\(?:left|right|big|Big|bigg|Bigg)(?![a-zA-Z])", ""),
    (r"\\(?:displaystyle|textstyle|limits|bf|it|rm|sf|tt|large|Large|LARGE|huge|Huge|normalsize)"
     r"(?![a-zA-Z])", ""),
    (r"\\(?:color|textcolor|[hv]?phantom|[hv]space\*?)\s*\{[^{}]*\}", ""),
    (r"\\(?:underline|bm|boldsymbol|hbox)(?![a-zA-Z])\s*(?=\{)", ""),
    (r"\\(?:checkmark|blacksquare|square|Box|qed)(?![a-zA-Z])", ""),
    (r"\\[dtc]frac(?![a-zA-Z])", r"\\frac"),
    (r"\\(?:math|text)(?:bf|rm|it|normal|sf|tt)(?![a-zA-Z])|\\operatorname|\\mbox", r"\\text"),
    (r"\^\s*\{?\s*\\text\s*\{\s*(?:st|nd|rd|th)\s*\}\s*\}?", ""),
    (r"\\text\s*\{\s*\$([^{}$]*)\$\s*\}", r"\1"),
    (r"\\text\s*\{\s*(\\?[$%€£¥¢]|USD|[ie]|[-+\d.,/ ]+)\s*\}", r"\1"),
    (r"\\text\s*\{\s*(\\?[$€£¥]?[-+\d][^{}]*|\(\s*[-+\d\\][^{}]*)\}", r"\1"),
    (r"(\d)\s*''", r"\1\\text{ inches}"),
    (r"(\d)\s*'", r"\1\\text{ feet}"),
    (r"(?i)\b([ap])\.m\b\.?", r"\1m"),
    (r"\\(?:leq|leqslant)(?![a-zA-Z])", r"\\le "),
    (r"\\(?:geq|geqslant)(?![a-zA-Z])", r"\\ge "),
    (r"\\neq(?![a-zA-Z])", r"\\ne "),
    (r"\\varnothing(?![a-zA-Z])", r"\\emptyset "),
    (r"\\colon(?![a-zA-Z])", ":"),
    (r"\\lbrace(?![a-zA-Z])", r"\\{"),
    (r"\\rbrace(?![a-zA-Z])", r"\\}"),
    (r"\\(overline|bar|dot)\s*(\d)", r"\\\1{\2}"),
    (r"\\pmod\s*(\d)", r"\\pmod{\1}"),
    (r"\\log_\s*(?:e|\{\s*e\s*\})(?![a-zA-Z])", r"\\ln "),
    (r"\{([^{}]*)\\choose(?![a-zA-Z])([^{}]*)\}", r"\\binom{\1}{\2}"),
    (r"\\\\\s*\[[^\]\\]*\]", r"\\\\"),
    (r"\\dots[bcm]?(?![a-zA-Z])|\\cdots(?![a-zA-Z])|\.\.\.+", r"\\ldots "),
    (r"\^\s*(?:\{\s*\\circ\s*\}|\\circ(?![a-zA-Z]))|\\degree(?![a-zA-Z])", r"\\text{ degrees}"),
    (r"(\\(?:sin|cos|tan|cot|sec|csc)\s*[({]?\s*[\d.]+)\s*\\text\{ degrees\}", r"\1\\pi/180 "),
    (r"(\d)\s*(?:\{,\}|(?<!\\)\\[,!;:]|(?<!\\)\\ |~)\s*(?=\d{3}(?!\d))", r"\1,"),
    (r"(?<!\\)\\[,!;:]|\\q?quad(?![a-zA-Z])|~|(?<!\\)\\ ", " "),
    (r"\*\*", "^"),
    (r"(?<![\\a-zA-Z])infinity(?![a-zA-Z])", r"\\infty"),
    (r"(?<![\\a-zA-Z])(pi|infty)(?![a-zA-Z])", r"\\\1"),
    (r"^\s*\\\{\s*[a-z]\s*(?:\\in\s*(?:\\mathbb\s*\{?\s*)?R\s*\}?\s*)?"
     r"(?:\\mid(?![a-zA-Z])|:|\|)(.*)\\\}\s*$", r"\1"),
    (r"(?i)^\s*\\text\s*\{\s*(?:the )?(?:final )?answer\s*(?:is)?\s*:?\s*\}", ""),
    (r"(?i)^\s*(?:so )?(?:the )?(?:final )?answer is\s*:?", ""),
    (r"^\s*=(?!=)", ""),
    (r"[\s,;]*\\*\s*$", ""),
]]  # fmt: skip
_SPACED_THOUSANDS = re.compile(r"-?\d{1,3}(?: \d{3})+(?:\.\d+)?")


def tidy(text: str) -> str:
    """One way of writing for signs, spaces and commands that mean the same in LaTeX."""
    text = text.translate(INVISIBLE)
    text = re.sub("[⁰¹²³⁴⁵⁶⁷⁸⁹⁻⁺]+", lambda m: "^{" + m[0].translate(_SUPERSCRIPTS) + "}", text)
    text = re.sub(
        "[½⅓⅔¼¾⅕⅖⅗⅘⅙⅚⅐⅛⅜⅝⅞⅑⅒]",
        lambda m: r"\frac{{{}}}{{{}}}".format(*unicodedata.normalize("NFKC", m[0]).split("⁄")),
        text,
    )
    text = unicodedata.normalize("NFKC", text)
    for sign, command in _SIGNS.items():
        text = text.replace(sign, command)
    text = text.replace("\r", " ").replace("\n", " ")
    for pattern, same in _SAME:
        text = pattern.sub(same, text)
    text = re.sub(r"(?<!\\)\$", " ", text) if text.count("$") > text.count("\\$") + 1 else text
    text = text.strip()
    while text.startswith("{") and braced(text, 1) == text[1:-1].strip():
        text = text[1:-1].strip()
    if _SPACED_THOUSANDS.fullmatch(text):
        text = text.replace(" ", ",")
    return text if text.endswith("ldots") else text.rstrip(".").strip()


def squeezed(text: str) -> str:
    """Without spaces, but for those between digits."""
    return re.sub(r"\s+(?!\d)|(?<!\d)\s+", "", text)


def plain_text(text: str) -> str:
    """Squeezed, with the contents of every `\\text{...}` in its place."""
    return squeezed(re.sub(r"\\text\s*\{([^{}]*)\}", r" \1 ", text))
