"""The reward of this run: how good an answer is.  Anything that Python can compute."""


def reward(text: str, label: str) -> float:
    """The share of the answer's characters that are the letter which the prompt asks for."""
    return text.count(label) / max(len(text), 1)
