"""Verifiers: one a file, found by name in this table."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from megatron_gpc.errors import UserError
from megatron_gpc.rewards import addition, mathematics

Verifier = Callable[[str, Any], float]
"""(response text, the prompt's label) -> reward, usually 0 or 1.  Pure: no state, no randomness."""

VERIFIERS: dict[str, Verifier] = {
    "addition": addition.verify,
    "math": mathematics.verify,
}


def verifier(name: str) -> Verifier:
    """The verifier of that name.

    Raises:
        UserError: there is none; lists those there are.  Or it needs what is not installed.
    """
    if name not in VERIFIERS:
        raise UserError(
            f"data.verifier={name!r} is unknown; there are: {', '.join(sorted(VERIFIERS))}"
        )
    if name == "math":
        mathematics.require()
    return VERIFIERS[name]
