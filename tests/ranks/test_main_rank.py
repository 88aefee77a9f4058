"""What the main rank does, every rank gets or raises, after the main rank has closed its things."""

from __future__ import annotations

import main_rank_ranks
import pytest

GIVEN = (0, "ENTERED")


def test_every_rank_gets_what_the_main_rank_gave(pool, tmp_path):
    first, second = pool(2).run(main_rank_ranks.outcome, "", tmp_path / "log")
    assert first[:3] == second[:3] == (*GIVEN, "the end")


@pytest.mark.parametrize(
    ("fail", "raised", "says"),
    [
        ("user", "UserError", "mend it"),
        ("bug", "ZeroDivisionError", "a bug"),
        ("feed", "KeyError", "in the middle"),
    ],
)
def test_every_rank_raises_what_the_main_rank_raised_once_that_has_closed(
    pool, tmp_path, fail, raised, says
):
    first, second = pool(2).run(main_rank_ranks.outcome, fail, tmp_path / "log")
    assert first[:3] == (*GIVEN, raised) and says in first[3]
    assert second[:2] == GIVEN and second[4], "told after the log was written"
    if raised == "UserError":
        assert second[2:4] == first[2:4]
    else:
        assert second[2] == "RunStopped" and second[3].startswith("the main rank failed")
        assert says in second[3] and "Traceback" in second[3]


def test_what_only_the_main_rank_has_is_not_called_elsewhere(pool):
    first, second = pool(2).run(main_rank_ranks.called_elsewhere)
    assert first == "HERE" and "upper: the main rank alone has this" in second
