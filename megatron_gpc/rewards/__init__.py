"""Built-in verifiers: one a file, found by name in this table; judging.py puts them to work."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from megatron_gpc.errors import UserError
from megatron_gpc.rewards import addition, mathematics
from megatron_gpc.rewards.extraction import END_TOKENS, said

Verifier = Callable[[str, Any], float]
"""(response text, the prompt's label) -> reward, usually 0 or 1.  Pure: no state, no randomness.

It may have a method `many`, which judges a list of (text, label) at once, in their order.
"""


@dataclass(frozen=True)
class BuiltIn:
    """A verifier of ours, given the answer alone: nothing from the end of the turn on."""

    verify: Verifier
    verify_all: Callable[[Sequence[tuple[str, Any]]], list[float]] | None = None
    """The same for many, if that is faster."""
    sees_end: bool = False
    """It judges the token that ends an answer too, and gets the whole text."""
    check_label: Callable[[Any], None] = lambda label: None
    """Raises a ValueError for a label that no answer can match."""
    special: Sequence[str] = END_TOKENS
    """The tokenizer's special tokens; the first that follows any text ends the answer."""

    def __call__(self, text: str, label: Any) -> float:
        return self.many([(text, label)])[0]

    def many(self, pairs: Sequence[tuple[str, Any]]) -> list[float]:
        """The reward of each (text, label)."""
        if not self.sees_end:
            pairs = [(said(text, self.special), label) for text, label in pairs]
        if self.verify_all:
            return self.verify_all(pairs)
        return [self.verify(text, label) for text, label in pairs]


def _text_or_number(label: Any) -> None:
    """Of `math`."""
    if (
        isinstance(label, bool)
        or not isinstance(label, str | int | float)
        or not str(label).strip()
    ):
        raise ValueError("expected the right answer, as text or a number")
    if isinstance(label, float) and not math.isfinite(label):
        raise ValueError("expected a finite number")


VERIFIERS: dict[str, BuiltIn] = {
    "addition": BuiltIn(addition.verify, sees_end=True, check_label=addition.check_label),
    "math": BuiltIn(mathematics.verify, mathematics.verify_all, check_label=_text_or_number),
}


def verifier(name: str, special: Sequence[str] = END_TOKENS) -> Verifier:
    """The verifier of that name.

    Args:
        special: the tokenizer's special tokens (rollout/tokenizer.py, special_tokens).

    Raises:
        UserError: there is none; lists those there are.  Or it needs what is not installed.
    """
    if name not in VERIFIERS:
        raise UserError(
            f"data.verifier={name!r} is unknown; there are: {', '.join(sorted(VERIFIERS))}"
        )
    if name == "math":
        mathematics.require()
    return replace(VERIFIERS[name], special=special)


def judge_all(judge: Verifier, pairs: Sequence[tuple[str, Any]]) -> list[float]:
    """The reward of each (text, label), by a verifier with or without `many`."""
    many = getattr(judge, "many", None)
    return many(pairs) if many else [judge(text, label) for text, label in pairs]
