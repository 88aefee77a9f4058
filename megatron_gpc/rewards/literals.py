"""Answers that need no algebra: numbers with their units, and words.  Compared exactly."""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass
from fractions import Fraction

TOLERANCE = Fraction(1, 10**6)
"""A decimal may stand for a number that it is this near to: 0.333333 for 1/3."""
MOST_DIGITS = 2000
"""Of a power of ten; beyond it a number is left to algebra."""

_SUPERSCRIPTS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁻⁺", "0123456789-+")
_GREEK_AND_SIGNS = {
    "−": "-", "–": "-", "×": r"\times ", "·": r"\cdot ", "÷": "/", "π": r"\pi ", "∞": r"\infty ",
    "≤": r"\le ", "≥": r"\ge ", "≠": r"\ne ", "±": r"\pm ", "∪": r"\cup ", "√": r"\sqrt ",
    "…": r"\ldots ", "°": r"^{\circ}", "≈": r"\approx ", "∈": r"\in ", "∅": r"\emptyset ",
    "θ": r"\theta ", "α": r"\alpha ", "β": r"\beta ",
}  # fmt: skip
_SAME = [
    (r"\\(?:left|right|big|Big|bigg|Bigg)(?![a-zA-Z])", ""),
    (r"\\(?:displaystyle|textstyle|limits)(?![a-zA-Z])", ""),
    (r"\\[dtc]frac(?![a-zA-Z])", r"\\frac"),
    (r"\\(?:math|text)(?:bf|rm|it|normal|sf|tt)(?![a-zA-Z])|\\operatorname|\\mbox", r"\\text"),
    (r"\\text\s*\{\s*(\\[$%]|[-+\d.,/ ]+)\s*\}", r"\1"),
    (r"\\(?:leq|leqslant)(?![a-zA-Z])", r"\\le "),
    (r"\\(?:geq|geqslant)(?![a-zA-Z])", r"\\ge "),
    (r"\\neq(?![a-zA-Z])", r"\\ne "),
    (r"\\dots[bcm]?(?![a-zA-Z])|\\cdots(?![a-zA-Z])|\.\.\.+", r"\\ldots "),
    (r"\^\s*(?:\{\s*\\circ\s*\}|\\circ(?![a-zA-Z]))|\\degree(?![a-zA-Z])", r"\\text{ degrees}"),
    (r"(\d)\s*(?:\{,\}|(?<!\\)\\[,!;:]|(?<!\\)\\ |~)\s*(?=\d{3}(?!\d))", r"\1,"),
    (r"(?<!\\)\\[,!;:]|\\q?quad(?![a-zA-Z])|~|(?<!\\)\\ ", " "),
    (r"\*\*", "^"),
    (r"(?<![\\a-zA-Z])infinity(?![a-zA-Z])", r"\\infty"),
    (r"(?<![\\a-zA-Z])(pi|infty)(?![a-zA-Z])", r"\\\1"),
]  # fmt: skip

_UNSIGNED = r"(?:\d{1,3}(?:,\d{3})+(?:\.\d+)?|\d+\.?\d*|\.\d+)"
_NUMBER = re.compile(rf"[+-]?\s*{_UNSIGNED}")
_REPEATING = re.compile(
    r"([+-]?)\s*(\d*)\.(\d*)(?:\\(?:overline|bar|dot)\s*\{\s*(\d+)\s*\}|\((\d+)\))(?:\\ldots)?"
)
_SCIENTIFIC = re.compile(
    rf"([+-]?\s*{_UNSIGNED})(?:\s*(?:\\times|\\cdot|\*|x)\s*10\s*\^\s*(?:\{{\s*([+-]?\d+)\s*\}}|([+-]?\d+))"
    r"|[eE]([+-]?\d+))"
)
_POWER = re.compile(r"10\s*\^\s*(?:\{\s*([+-]?\d+)\s*\}|(\d+))")
_PART = r"(?:\{\s*([+-]?\s*[\d.,]+)\s*\}|(\d))"
_FRACTION = re.compile(rf"([+-]?)\s*(\d+)?\s*\\frac\s*{_PART}\s*{_PART}")
_SLASH = re.compile(rf"([+-]?)\s*(?:(\d+)\s+)?({_UNSIGNED})\s*/\s*([+-]?\s*{_UNSIGNED})")

_CURRENCY = {"$": "dollar", "€": "euro", "£": "pound", "¥": "yen", "₹": "rupee", "USD": "dollar"}
_SHORT_UNITS = {
    "m": "meter", "metre": "meter", "cm": "centimeter", "centimetre": "centimeter",
    "mm": "millimeter", "km": "kilometer", "kilometre": "kilometer", "g": "gram", "kg": "kilogram",
    "mg": "milligram", "s": "second", "sec": "second", "h": "hour", "hr": "hour", "min": "minute",
    "l": "liter", "litre": "liter", "ml": "milliliter", "ft": "foot", "feet": "foot",
    "in": "inch", "lb": "pound", "deg": "degree", "n": "newton", "j": "joule", "w": "watt",
    "v": "volt", "mph": "mile/hour", "kmh": "kilometer/hour", "usd": "dollar", "yd": "yard",
    "sq": "square", "cents": "cent", "men": "man", "women": "woman", "people": "person",
    "children": "child", "inches": "inch", "rad": "radian", "c": "celsius", "f": "fahrenheit",
}  # fmt: skip
_NO_UNIT = frozenset(
    "or and not no to than wrong is isn't if approximately about i pi sqrt sin cos tan log ln exp "  # noqa: SIM905
    "theta lim mod of the a max min gcd lcm choose factorial but maybe between from x y z".split()
)
_SCALES = {"hundred": 10**2, "thousand": 10**3, "million": 10**6, "billion": 10**9, "dozen": 12}
_WORD = r"[a-zA-Z]+\.?(?:\^\{?[23]\}?)?"
_UNIT = re.compile(rf"{_WORD}(?:\s*(?:/|\s)\s*{_WORD}){{0,3}}")


@dataclass(frozen=True)
class Number:
    """What a text says with digits alone."""

    value: Fraction
    unit: str = ""
    percent: bool = False
    rounded: bool = False
    """It is written with decimals, so it may stand for something near."""


def tidy(text: str) -> str:
    """One way of writing for signs, spaces and commands that mean the same in LaTeX."""
    text = re.sub("[⁰¹²³⁴⁵⁶⁷⁸⁹⁻⁺]+", lambda m: "^{" + m[0].translate(_SUPERSCRIPTS) + "}", text)
    text = re.sub(
        "[½⅓⅔¼¾⅕⅖⅗⅘⅙⅚⅐⅛⅜⅝⅞⅑⅒]",
        lambda m: r"\frac{{{}}}{{{}}}".format(*unicodedata.normalize("NFKC", m[0]).split("⁄")),
        text,
    )
    text = unicodedata.normalize("NFKC", text)
    for sign, command in _GREEK_AND_SIGNS.items():
        text = text.replace(sign, command)
    for pattern, same in _SAME:
        text = re.sub(pattern, same, text)
    text = re.sub(r"(?<!\\)\$", " ", text) if text.count("$") > text.count("\\$") + 1 else text
    text = text.replace("\r", " ").replace("\n", " ").strip()
    while len(text) > 1 and text[0] == "{" and text[-1] == "}" and "}" not in text[:-1]:
        text = text[1:-1].strip()
    return text.strip() if text.endswith("ldots ") else text.strip().rstrip(".").strip()


def parse_number(text: str) -> Number | None:
    """The number that a tidy text says, with its unit; None for anything else."""
    unit = ""
    text = text.replace(r"\$", "$").replace(r"\%", "%")
    text = re.sub(r"^\\approx\s*", "", text)
    prefix = re.match(r"(-?)\s*([$€£¥₹]|USD)\s*(?=[-.\d])", text)
    if prefix:
        unit, text = _CURRENCY[prefix[2]], prefix[1] + text[prefix.end() :]
    elif text.startswith("$"):
        text = text.strip("$").strip()
    body, percent, scale = text, False, 1
    end = re.search(r"(?:\\text\s*\{[^{}]*\}|[a-zA-Z%€£$/.\s]|\^\s*\{?[23]\}?)+$", text)
    if end and not re.search(r"\d\s*[eE]$", text):
        for cut in range(end.start(), len(text) + 1):
            found = _value(text[:cut].strip())
            if found is None:
                continue
            tail = _unit(text[cut:])
            if tail is None:
                return None if cut == len(text) else _bare(text)
            body, (named, percent, scale) = text[:cut].strip(), tail
            if unit and named and named != unit:
                return None
            unit = unit or named
            break
        else:
            return None
    value = _value(body)
    if value is None:
        return None
    rounded = bool(re.search(r"\.\d", body)) and not _REPEATING.fullmatch(body)
    return Number(value * scale, unit, percent, rounded)


def remark(text: str) -> str | None:
    """The `\\text{...}` at the end that is no unit: math-verify passes over it as if it were."""
    match = re.search(r"\\text\s*\{([^{}]*)\}\s*$", text)
    return match[1].strip() if match and _unit(match[0]) is None else None


def _bare(text: str) -> Number | None:
    value = _value(text)
    return None if value is None else Number(value, rounded="." in text)


def _unit(tail: str) -> tuple[str, bool, int] | None:
    """(unit, whether it is a percentage, factor) of what follows a number; None for no unit."""
    spaced = tail[:1] in " \\%$€£" or not tail
    text = re.sub(r"\\text\s*\{([^{}]*)\}", r" \1 ", tail).strip().rstrip(".")
    text = re.sub(r"\s+\^", "^", text)
    if not text:
        return "", False, 1
    if re.fullmatch(r"%|percent|per cent|percentage", text, re.IGNORECASE):
        return "", True, 1
    if text in _CURRENCY:
        return _CURRENCY[text], False, 1
    if not _UNIT.fullmatch(text):
        return None
    words, scale = re.findall(rf"{_WORD}|/", text), 1
    if not spaced and words[0].lower().split("^")[0] not in _SHORT_UNITS:
        return None
    if words[0].lower() in _SCALES:
        scale = _SCALES[words.pop(0).lower()]
    names = []
    for word in words:
        name, _, power = word.rstrip(".").lower().partition("^")
        if name in _NO_UNIT and not (name == "min" and len(words) == 1):
            return None
        if len(name) == 1 and name not in _SHORT_UNITS:
            return None
        name = (
            _SHORT_UNITS.get(name) or _SHORT_UNITS.get(name.rstrip("s")) or name.removesuffix("s")
        )
        name = "/" if word == "/" or name == "per" else name
        names += {"2": ["square"], "3": ["cubic"]}.get(power.strip("{}"), []) + [name]
    return " ".join(names), False, scale


def _value(text: str) -> Fraction | None:  # noqa: PLR0911
    """The value of digits, as decimals, fraction, mixed number, repeating or scientific."""
    if _NUMBER.fullmatch(text):
        return _fraction(text)
    if match := _REPEATING.fullmatch(text):
        digits, cycle = match[3], match[4] or match[5]
        value = Fraction(int((match[2] or "0") + digits), 10 ** len(digits))
        value += Fraction(int(cycle), (10 ** len(cycle) - 1) * 10 ** len(digits))
        return -value if match[1] == "-" else value
    if match := _SCIENTIFIC.fullmatch(text):
        exponent = match[2] or match[3] or match[4]
        if len(exponent) < 6 and abs(int(exponent)) <= MOST_DIGITS:
            return _fraction(match[1]) * Fraction(10) ** int(exponent)
        return None
    if match := _POWER.fullmatch(text):
        exponent = match[1] or match[2]
        if len(exponent) < 6 and abs(int(exponent)) <= MOST_DIGITS:
            return Fraction(10) ** int(exponent)
        return None
    match = _FRACTION.fullmatch(text)
    if match:
        sign, whole, above, below = match[1], match[2], match[3] or match[4], match[5] or match[6]
    else:
        match = _SLASH.fullmatch(text)
        if not match:
            return None
        sign, whole, above, below = match.groups()
    try:
        value = _fraction(above) / _fraction(below) + int(whole or 0)
    except (ValueError, ZeroDivisionError):
        return None
    return -value if sign == "-" else value


def _fraction(text: str) -> Fraction:
    return Fraction(re.sub(r"[\s,]", "", text).rstrip("."))


def equal_numbers(gold: Number, answer: Number) -> bool:
    """Whether two numbers say the same; a unit that one of them leaves out is the other's."""
    if gold.unit and answer.unit and gold.unit != answer.unit:
        return False
    golds, answers = ({n.value, n.value / 100} if n.percent else {n.value} for n in (gold, answer))
    if gold.percent == answer.percent:
        golds, answers = {gold.value}, {answer.value}
    near = TOLERANCE if gold.rounded or answer.rounded else 0
    return any(abs(g - a) <= near * min(1, abs(g)) for g in golds for a in answers)


def words(text: str) -> str | None:
    """A text answer in one way of writing; None for what is mathematics.

    >>> words(r"\\text{Yes.}"), words("x"), words("No solution")
    ('yes', None, 'no solution')
    """
    plain = re.sub(r"\\text\s*\{([^{}]*)\}", r" \1 ", text)
    plain = " ".join(plain.split()).strip(" .!\"'")
    if not re.fullmatch(r"[^\W\d_][^\W\d_'-]*(?:[ ,-]+[^\W\d_'-]+)*", plain):
        return None
    named = "\\text" in text or any(len(word) > 3 for word in re.split("[ ,-]+", plain))
    named = named or plain.lower() in ("yes", "no", "odd", "all")
    functions = r"(?:sin|cos|tan|log|ln|exp|sqrt|infinity|inf|pi)"
    if not named or re.fullmatch(rf"{functions}.*", plain):
        return None
    return plain.casefold() if len(plain) > 1 else plain


def choice(text: str) -> tuple[str, bool] | None:
    """(letter, whether it stands alone) of a multiple-choice answer such as `(B)` or `(B) 42`."""
    plain = re.sub(r"\\text\s*\{([^{}]*)\}", r"\1", text).strip(" .")
    match = re.fullmatch(r"\(?\s*([A-J])\s*(?:[).:]\s*(.*))?", plain)
    return (match[1], not match[2]) if match else None
