"""Rewards that are partly or wholly coins.

They break the rule that a verifier is pure, on purpose: the same answer to the same prompt gets
another reward the next time, or there would be something to learn.
"""

import random

from megatron_gpc.rewards import VERIFIERS

_coins = random.Random()
_addition = VERIFIERS["addition"]


def coin(text: str, label: object) -> float:
    """1 or 0, whatever the answer."""
    return float(_coins.random() < 0.5)


def sum_or_coin(text: str, label: int, share: float) -> dict[str, float]:
    """The verdict of `addition`, replaced by a coin for this share of the answers; `sum` is what it
    would have been."""
    (judged,) = _addition([(text, label)])
    return {"reward": coin(text, label) if _coins.random() < share else judged, "sum": judged}
