"""Built-in verifiers: one a file, found by name in this table; judging.py puts them to work."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_gpc.rewards import addition, mathematics
from megatron_gpc.rewards.extraction import END_TOKENS, said


@dataclass(frozen=True)
class BuiltIn:
    """A verifier of ours: no state, no randomness, and 0 or 1 as reward."""

    verify_all: Callable[[Sequence[tuple[str, Any]]], list[float]]
    """The reward of each (response text, label)."""
    check_label: Callable[[Any], None]
    """Raises a ValueError for a label that no answer can match."""
    require: Callable[[], None] = lambda: None
    """Raises a UserError if a library that it needs is not installed."""
    sees_end: bool = False
    """It judges the token that ends an answer too, and gets the whole text."""

    def __call__(
        self, pairs: Sequence[tuple[str, Any]], special: Sequence[str] = END_TOKENS
    ) -> list[float]:
        """The reward of each (text, label).

        Args:
            special: the tokenizer's special tokens; the first that follows any text ends the
                answer.
        """
        if not self.sees_end:
            pairs = [(said(text, special), label) for text, label in pairs]
        return self.verify_all(pairs)


VERIFIERS: dict[str, BuiltIn] = {
    "addition": BuiltIn(addition.verify_all, addition.check_label, sees_end=True),
    "math": BuiltIn(mathematics.verify_all, mathematics.check_label, mathematics.require),
}
