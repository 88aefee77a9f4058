"""The verifier of the example."""

from __future__ import annotations

import pytest

from megatron_gpc.rewards.addition import verify


@pytest.mark.parametrize("text", ["1+499$", "250+250$", "499+1$"])
def test_right_sums(text):
    assert verify(text, 500) == 1.0


@pytest.mark.parametrize(
    "text",
    [
        "1+498$",
        "1+499",
        "+500$",
        "0+500$",
        "01+499$",
        "1+0499$",
        "1+499$$",
        " 1+499$",
        "-1+501$",
        "1+499$\n",
        "",
        "١+499$",
        "9" * 5000 + "+1$",
    ],
)
def test_everything_else_is_wrong(text):
    assert verify(text, 500) == 0.0
