"""What the example rewards."""

import re


def fits(text: str, label: list[int]) -> float:
    """1 for 16 digits that end in the prompt's first one and whose sum has its second's parity."""
    ending, parity = label
    if not re.fullmatch("[0-9]{16}", text):
        return 0.0
    return float(int(text[-1]) == ending and sum(map(int, text)) % 2 == parity % 2)
