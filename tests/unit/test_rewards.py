"""The verifier of the example, and the table."""

from __future__ import annotations

import pytest

from megatron_gpc.errors import UserError
from megatron_gpc.rewards import verifier
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


def test_unknown_verifiers_are_refused_with_the_list():
    with pytest.raises(UserError, match="there are: addition, math"):
        verifier("addtion")
