"""What the example rewards."""

import re
from collections.abc import Sequence

OCCURRENCES = 5
"""Of the prompt's first digit, that a hard prompt asks for."""


def is_hard(label: Sequence[int]) -> bool:
    """Whether a prompt with these digits asks for what the start seldom does."""
    return label[1] >= 5


def unlocks(text: str, label: list[int]) -> dict[str, float]:
    """1 for 16 digits that do what the prompt's second digit asks for; the mean over easy prompts
    and that over hard ones are metrics of their own."""
    wanted, _, parity = label
    fits = re.fullmatch("[0-9]{16}", text) is not None
    if is_hard(label):
        reward = float(fits and text.count(str(wanted)) >= OCCURRENCES)
        return {"reward": reward, "hard": reward}
    reward = float(fits and sum(map(int, text)) % 2 == parity % 2)
    return {"reward": reward, "easy": reward}
