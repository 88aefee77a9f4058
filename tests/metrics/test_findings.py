"""What the study and the comparison say of runs, on runs whose numbers are known."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
from commands import ROOT

from megatron_gpc.config.file import load
from megatron_gpc.metrics.intervals import interval
from megatron_gpc.metrics.runs import Run, load_run

EXAMPLES = ROOT / "examples"
for folder in (EXAMPLES, EXAMPLES / "entropy_study"):
    sys.path.append(str(folder))

from arms import COIN_SETTINGS, COINS, PARTS, TITLES, coin_arm  # noqa: E402
from claims import CLAIMS, Claim, Verdict, drift, fit, judge, moved, switches  # noqa: E402
from findings import difference, mean_entropy, over, paired_tables  # noqa: E402


def run_of(**series: list[float]) -> Run:
    lines = [
        {"step": k + 1} | {name: values[k] for name, values in series.items()}
        for k in range(len(next(iter(series.values()))))
    ]
    config = {"train.steps": len(lines), "train.mini_batches": 4, "train.epochs": 2, "seed": 0}
    return Run(Path("run"), config, lines)


def test_numbers_of_a_run_are_those_of_its_windows():
    rising = run_of(entropy=[1 + k / 60 for k in range(60)], eps_high_at_p0=[0.2] * 20 + [0.5] * 40)
    assert mean_entropy(rising, 0.0, 1 / 60) == 1.0  # the first step alone
    assert mean_entropy(rising, 56 / 60, 1.0) == pytest.approx(1 + 57.5 / 60)
    assert moved(rising, (0.0, 0.5), (0.5, 1.0)) == pytest.approx(0.5)
    assert drift(rising) == pytest.approx(1 / 60 / 8)  # for each of the 4 x 2 updates
    assert switches(rising) == 1
    short = run_of(entropy=[1.0, 3.0])
    assert mean_entropy(short, 0.0, 1 / 60) == 1.0 and mean_entropy(short, 0.9, 1.0) == 3.0


def test_a_difference_is_taken_over_the_seeds_that_have_both():
    def seed(static: float, hi: float | None) -> dict[str, Run]:
        runs = {"static": run_of(entropy=[static] * 3)}
        return runs if hi is None else runs | {"hi": run_of(entropy=[hi] * 3)}

    seeds = [seed(1.0, 1.5), seed(2.0, 2.7), seed(9.0, None)]
    found = difference(seeds, "hi", "static", mean_entropy)
    assert (found.mean, found.seeds) == (pytest.approx(0.6), 2)
    assert over(seeds, "static", mean_entropy).mean == pytest.approx(4.0)
    table = paired_tables(seeds, TITLES, ["static", "hi", "lo"], {"entropy": mean_entropy})
    assert f"| Hi(p) alone - static | 2 | {interval([0.5, 0.7])} |" in table
    assert "Lo(p)" not in table
    (verdict,) = [v for v in judge(seeds) if v.claim.arms == ("hi", "static")]
    assert verdict.found.seeds == 2 and verdict.word == "not shown"  # 0.6 ± 1.3
    others = {v.word for v in judge(seeds) if "lo" in v.claim.arms}
    assert others == {"not measured"}


def test_verdicts_follow_from_the_numbers_alone():
    def word(sign: int, *values: float) -> str:
        return Verdict(Claim("a", "", (), lambda s: 0.0, sign), interval(values)).word

    assert word(1, 0.1, 0.2, 0.3) == "not shown"  # 0.2 ± 0.248
    assert word(1, 0.2, 0.25, 0.3) == "reproduced"
    assert word(-1, 0.2, 0.25, 0.3) == "opposite"
    assert word(-1, -0.1) == "sign agrees (one seed)"
    assert word(1, float("nan"), float("nan")) == "not measured"


def test_a_prediction_fits_as_well_as_it_correlates_with_what_was_measured():
    values = np.random.default_rng(0).standard_normal((2, 50)).tolist()
    run = run_of(dh_measured=values[0], dh_second_order=[2 * v for v in values[0]])
    assert fit(run, "dh_second_order") == pytest.approx(1.0)
    assert np.isnan(fit(run, "dh_directional"))


@pytest.mark.parametrize("part", PARTS.values(), ids=list(PARTS))
def test_every_arm_of_the_study_is_a_valid_configuration_with_a_title(part, monkeypatch):
    for arm, given in part.arms.items():
        config = load(part.config, [*part.common, *given])
        assert config.parallel.tp == config.parallel.pp == 1 and arm in TITLES
    needed = {arm for claim in CLAIMS for arm in claim.arms}
    assert needed <= {arm for one in PARTS.values() for arm in one.arms}
    assert {coin_arm(setting, arm) for setting in COIN_SETTINGS for arm in COINS} == set(
        PARTS["coin"].arms
    )


def test_coins_say_nothing_and_a_share_of_them_hides_the_rest():
    from noisy import coin, sum_or_coin

    assert sum_or_coin("1+99$", 100, share=0.0) == {"reward": 1.0, "sum": 1.0}
    assert sum_or_coin("1+98$", 100, share=0.0) == {"reward": 0.0, "sum": 0.0}
    heads = sum(coin("", None) for _ in range(2000))
    mixed = sum(sum_or_coin("1+99$", 100, share=0.5)["reward"] for _ in range(2000))
    assert 850 < heads < 1150 and 1350 < mixed < 1650  # 6 standard deviations or more


def test_the_report_is_made_of_the_runs_that_are_there(write_run, tmp_path):
    from report import write_report

    seeds = [
        {
            arm: load_run(write_run(f"{arm}-{seed}", arm, seed, steps=20))
            for arm in ("static", "hi", "id")
        }
        for seed in (10, 11)
    ]
    text = write_report(seeds, tmp_path, "the command").with_suffix(".md").read_text()
    assert "6 runs of examples/entropy_control, seeds 10, 11: 20 steps, 32 prompts x 8" in text
    assert "8 updates a rollout" in text and "No seed was used for choosing the task" in text
    assert "- Lo(p) holds less entropy than static 0.2" in text.split("## Not measured yet")[1]
    assert "Not measured yet: `python examples/entropy_study/study.py --parts noise`." in text
    assert "| Hi(p) alone - static | 2 |" in text
    html = (tmp_path / "report.html").read_text()
    assert html.count("data:image/png;base64,") == 2 and ".png" not in html


def test_what_does_not_pay_is_said_first():
    comparison = runpy.run_path(str(EXAMPLES / "exploration" / "compare.py"))
    headline, arms, titles = (comparison[name] for name in ("headline", "ARMS", "TITLES"))

    def seed(**solved: float) -> dict[str, Run]:
        return {arm: run_of(eval_solved=[v]) for arm, v in solved.items()}

    seeds = [seed(static=0.5, hi=0.8, id=0.6, lo=0.1), seed(static=0.4, hi=0.71, id=0.3, lo=0.1)]
    said = headline(seeds, ["static", "id", "hi"])
    worse, unknown, better = said.split("\n")[2:]
    assert worse.endswith("none")
    assert "ID (" in unknown and "2 seeds" in unknown and "Hi(p) throughout (0.305" in better
    assert "Two seeds" in headline(seeds[:1], ["static", "hi"])
    for arm, given in arms.items():
        assert load(comparison["CONFIG"], list(given)).eval.samples == 64 and arm in titles
