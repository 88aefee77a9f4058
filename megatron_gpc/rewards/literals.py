"""Answers that need no algebra: numbers with their units, and words.  Compared exactly."""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction

TOLERANCE = Fraction(1, 10**6)
"""A number of six or more decimals may stand for one that it is a rounding of: 0.333333 for 1/3."""
MOST_DIGITS = 2000
"""Of a power of ten; beyond it a number is left to algebra."""

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

_CURRENCY = {"$": "dollar", "€": "euro", "£": "pound", "¥": "yen", "₹": "rupee", "¢": "cent",
             "USD": "dollar"}  # fmt: skip
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
    "theta lim mod of the a max min gcd lcm choose factorial but maybe between from x y z half "
    "squared cubed off false incorrect more less fewer plus minus divided over remainder".split()
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
    last: Fraction = Fraction(0)
    """What its last decimal is worth; 0 without decimals.  A rounded number is off by less."""


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
    end = re.search(r"(?:\\text\s*\{[^{}]*\}|[a-zA-Z%€£¥₹¢$/.\s]|\^\s*\{?[23]\}?)+$", text)
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
    return Number(value * scale, unit, percent, _last(body) * scale)


def remarks(text: str) -> list[str]:
    """Every `\\text{...}` that is no unit of the whole: math-verify passes over them all."""
    remarks = []
    for match in re.finditer(r"\\text\s*\{([^{}]*)\}", text):
        word, after = match[1].strip().casefold(), text[match.end() :].strip()
        unit = _unit(match[0]) is not None and (word == "degrees" or not after)
        if not (unit and not re.match(r"[-+]?\d", after)) and word not in ("and", "or", ""):
            remarks.append(word)
    return sorted(remarks)


def _bare(text: str) -> Number | None:
    value = _value(text)
    return None if value is None else Number(value, last=_last(text))


def _last(text: str) -> Fraction:
    """What the last decimal of a number is worth; 0 for one without decimals, which is exact."""
    decimals = re.search(r"\.(\d+)", text)
    if not decimals or _REPEATING.fullmatch(text):
        return Fraction(0)
    match = _SCIENTIFIC.fullmatch(text)
    exponent = int(match[2] or match[3] or match[4]) if match else 0
    return Fraction(10) ** (exponent - len(decimals[1]))


def _unit(tail: str) -> tuple[str, bool, int] | None:
    """(unit, whether it is a percentage, factor) of what follows a number; None for no unit."""
    spaced = tail[:1] in " \\%$€£¥₹¢" or not tail
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
    name = words[0].lower().split("^")[0]
    if not spaced and (name not in _SHORT_UNITS or words[0] in ("n", "j", "w", "v", "c", "f")):
        return None  # rather a variable: 5n
    if words[0].lower() in _SCALES:
        scale = _SCALES[words.pop(0).lower()]
    names = []
    for word in words:
        name, _, power = word.rstrip(".").lower().partition("^")
        if name in _NO_UNIT and not (name == "min" and len(words) == 1):
            return None
        if len(name) == 1 and name not in _SHORT_UNITS and name != "/":
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
    if (gold.percent and answer.unit) or (gold.unit and answer.percent):
        return False
    if _near(gold.value, gold.last, answer.value, answer.last):
        return True
    if gold.percent == answer.percent:
        return False
    part, other = (gold, answer) if gold.percent else (answer, gold)
    return _near(part.value / 100, part.last / 100, other.value, other.last)


def _near(gold: Fraction, gold_last: Fraction, answer: Fraction, answer_last: Fraction) -> bool:
    """Whether two numbers are equal, or one of them is a rounding of the other."""
    apart, last = abs(gold - answer), gold_last or answer_last
    return not apart or (apart < last <= TOLERANCE and apart <= TOLERANCE * min(1, abs(gold)))


def words(text: str) -> str | None:
    """A text answer in one way of writing; None for what is mathematics.

    >>> words(r"\\text{Yes.}"), words("x"), words("No solution")
    ('ye', None, 'no solution')
    """
    plain = re.sub(r"\\text\s*\{([^{}]*)\}", r" \1 ", text)
    plain = " ".join(plain.split()).strip(" .!\"'")
    if not re.fullmatch(r"[^\W\d_][^\W\d_'-]*(?:[ ,-]+[^\W\d_'-]+)*", plain):
        return None
    named = "\\text" in text or any(len(word) > 3 for word in re.split("[ ,-]+", plain))
    named = named or plain.lower() in ("yes", "no", "odd", "all")
    plain = re.sub(r"^(?:an?|the) +(?=\w\w)", "", plain, flags=re.IGNORECASE)
    functions = r"(?:sin|cos|tan|log|ln|exp|sqrt|infinity|inf|pi)"
    if not named or re.fullmatch(rf"{functions}.*", plain):
        return None
    return plain.casefold().removesuffix("s") if len(plain) > 1 else plain


def choice(text: str) -> tuple[str, str] | None:
    """(letter, what follows it) of a multiple-choice answer such as `(B)` or `(B) 42`."""
    plain = re.sub(r"\\text\s*\{([^{}]*)\}", r"\1", text).strip(" .")
    plain = re.sub(r"^(?:option|choice) ", "", plain, flags=re.IGNORECASE)
    match = re.fullmatch(r"\(?\s*([A-J])\s*(?:[).:]\s*(.*))?", plain)
    if not match or re.search(r"\b(?:and|or)\b|\([A-J]\)", match[2] or ""):
        return None
    return match[1], match[2] or ""
