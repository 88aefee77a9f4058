"""What runs over seeds say: numbers of a run, means and paired differences, tables and pictures.

A difference is taken seed by seed, so that what a seed decides (prompts, first samples) cancels;
its mean over seeds has a 95 % interval of Student's t (megatron_gpc/metrics/intervals.py).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure

from megatron_gpc.metrics.intervals import Interval, interval
from megatron_gpc.metrics.panels import GROUP_COLOURS, STYLE, save_figure
from megatron_gpc.metrics.pass_at_k import powers_of_two
from megatron_gpc.metrics.plots import groups_figure
from megatron_gpc.metrics.runs import Run, SeedGroup

Seed = Mapping[str, Run]
"""Arm -> run, of one seed."""
Number = Callable[[Run], float]
"""What a run is asked for."""
STATIC = "static"
"""The arm that others are compared with."""


# --- numbers of one run -----------------------------------------------------------------------


def mean_entropy(run: Run, begin: float = 0.0, end: float = 1.0) -> float:
    """Over the steps between two shares of the run, at least one."""
    values = run.series("entropy").values
    first = min(round(begin * len(values)), len(values) - 1)
    return float(np.nanmean(values[first : max(round(end * len(values)), first + 1)]))


def at_end(metric: str) -> Number:
    """The last evaluation's; nan if it was not made."""

    def number(run: Run) -> float:
        values = run.series(metric).values
        return float(values[-1]) if len(values) else math.nan

    return number


def held_out_numbers(samples: int) -> dict[str, Number]:
    """What evaluations of so many samples a prompt say at the end of a run: heading -> number."""
    return {
        "held-out reward": at_end("eval_reward"),
        "distinct right": at_end("eval_distinct_right"),
        **{f"pass@{k}": at_end(f"eval_pass_at_{k}") for k in powers_of_two(samples)},
    }


# --- over seeds -------------------------------------------------------------------------------


def over(seeds: Sequence[Seed], arm: str, number: Number) -> Interval:
    """Of the seeds that have the arm."""
    return interval([number(seed[arm]) for seed in seeds if arm in seed])


def difference(seeds: Sequence[Seed], arm: str, other: str, number: Number) -> Interval:
    """arm - other, of the seeds that have both."""
    both = [(seed[arm], seed[other]) for seed in seeds if arm in seed and other in seed]
    return interval([number(one) - number(another) for one, another in both])


def in_all(seeds: Sequence[Seed], arms: Sequence[str]) -> list[str]:
    """Those of the arms that any seed has."""
    return [arm for arm in arms if any(arm in seed for seed in seeds)]


def groups(
    seeds: Sequence[Seed], titles: Mapping[str, str], arms: Sequence[str]
) -> list[SeedGroup]:
    """An arm's runs as a group, to be drawn."""
    return [
        SeedGroup(titles[arm], [seed[arm] for seed in seeds if arm in seed])
        for arm in in_all(seeds, arms)
    ]


# --- tables and pictures ----------------------------------------------------------------------


def markdown_table(headings: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    lines = [headings, ["---"] * len(headings), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def paired_tables(
    seeds: Sequence[Seed],
    titles: Mapping[str, str],
    arms: Sequence[str],
    numbers: Mapping[str, Number],
) -> str:
    """Every arm's numbers, and how they differ from the static arm's, if that is there.

    Args:
        numbers: heading -> number.
    """
    there = in_all(seeds, arms)
    counts = [sum(arm in seed for seed in seeds) for arm in there]
    rows = [
        (titles[arm], count, *(over(seeds, arm, number) for number in numbers.values()))
        for arm, count in zip(there, counts, strict=True)
    ]
    text = markdown_table(["", "seeds", *numbers], rows)
    if STATIC not in there:
        return text
    differences = [
        (
            f"{titles[arm]} - static",
            sum(arm in seed and STATIC in seed for seed in seeds),
            *(difference(seeds, arm, STATIC, number) for number in numbers.values()),
        )
        for arm in there
        if arm != STATIC
    ]
    return text + "\n\n" + markdown_table(["", "seeds", *numbers], differences)


def draw_over_steps(
    seeds: Sequence[Seed],
    titles: Mapping[str, str],
    arms: Sequence[str],
    panels: Mapping[str, str],
    picture: Path,
) -> None:
    """One panel a metric (-> title), one colour an arm."""
    save_figure(groups_figure(groups(seeds, titles, arms), panels), picture)


def draw_pass_at_k(
    seeds: Sequence[Seed],
    titles: Mapping[str, str],
    arms: Sequence[str],
    samples: int,
    picture: Path,
) -> None:
    ks = powers_of_two(samples)
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(8, 4), layout="constrained")
        ax = figure.subplots()
        ax.set_title("pass@k on held-out prompts, after the last step")
        ax.set_xscale("log", base=2)
        ax.set_xticks(ks, [str(k) for k in ks])
        ax.set_xlabel("k")
        for number, arm in enumerate(in_all(seeds, arms)):
            found = [over(seeds, arm, at_end(f"eval_pass_at_{k}")).mean for k in ks]
            colour = GROUP_COLOURS[number % len(GROUP_COLOURS)]
            style = "-" if number < len(GROUP_COLOURS) else "--"
            ax.plot(ks, found, style, color=colour, label=titles[arm])
        figure.legend(loc="outside right upper")
    save_figure(figure, picture)
