"""Panels that show where entropy goes, by region (docs/entropy.md)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from megatron_gpc.metrics.panels import (
    BLACK,
    BLUE,
    GREY,
    ORANGE,
    RED,
    SKY,
    line,
    percent,
    say_missing,
    start_panel,
)
from megatron_gpc.metrics.runs import Run, correlation, paired

REGION_LINES = (  # from the bottom up: what raises entropy, then what lowers it
    ("e2", "E2 unlikely, A > 0: H ↑", BLUE),
    ("e3", "E3 likely, A < 0: H ↑", SKY),
    ("e1", "E1 likely, A > 0: H ↓", ORANGE),
    ("e4", "E4 unlikely, A < 0: H ↓", RED),
)
PREDICTIONS = (
    ("dh_predicted", "logit space", ORANGE),
    ("dh_directional", "first order", SKY),
    ("dh_second_order", "second order", BLUE),
)


def share_panel(ax: Axes, run: Run, metric: str, title: str) -> None:
    """What the regions hold of a whole, over steps: metrics METRIC_e1 to METRIC_e4."""
    start_panel(ax, title, run)
    ax.set_title(ax.get_title("left"), pad=30)  # the legend stands below it
    shares = [run.series(f"{metric}_{name}").smooth() for name, _, _ in REGION_LINES]
    steps = shares[0].steps
    if not len(steps) or any(len(share) != len(steps) for share in shares):
        say_missing(ax)
        return
    values = np.array([share.values for share in shares])
    if len(steps) == 1:  # an area needs two points
        steps, values = np.array([steps[0] - 0.5, steps[0] + 0.5]), values.repeat(2, axis=1)
    ax.stackplot(
        steps,
        values,
        labels=[label for _, label, _ in REGION_LINES],
        colors=[colour for _, _, colour in REGION_LINES],
        alpha=0.85,
    )
    ax.set_ylim(0, 1)
    ax.yaxis.set_major_formatter(percent)
    ax.legend(
        loc="lower left", bbox_to_anchor=(-0.02, 1), ncols=2, handlelength=0.8, columnspacing=1
    )


def dh_panel(ax: Axes, run: Run) -> None:
    """The logit-space prediction: what each region pulls entropy by, and their sum."""
    start_panel(ax, "predicted change of H, by region", run)
    series = [run.series(f"dh_predicted_{name}").smooth() for name, _, _ in REGION_LINES]
    total = run.series("dh_predicted").smooth()
    if not all(map(len, (*series, total))):
        say_missing(ax)
        return
    ax.axhline(0, color=GREY, linewidth=0.8)
    for one, (name, _, colour) in zip(series, REGION_LINES, strict=True):
        line(ax, one, color=colour, linewidth=1.3, label=name.upper())
    line(ax, total, color=BLACK, label="sum")
    ax.set_ylabel("nats a token, eta = 1")
    ax.margins(y=0.2)
    ax.legend(loc="upper right", ncols=5, columnspacing=0.8, handlelength=0.8)


def prediction_panel(ax: Axes, run: Run) -> None:
    """Predicted against measured change of entropy, a point a step (diagnostics.entropy_change);
    if it was not measured, how often the tokens of each region were clipped."""
    measured = run.series("dh_measured")
    if not len(measured):
        start_panel(ax, "tokens of each region clipped", run)
        found = [(run.series(f"clip_fraction_{name}"), name, c) for name, _, c in REGION_LINES]
        if not all(len(series) for series, _, _ in found):
            say_missing(ax)
            return
        for series, name, colour in found:
            line(ax, series.smooth(), color=colour, label=name.upper())
        ax.yaxis.set_major_formatter(percent)
        ax.legend(loc="upper right", ncols=4, columnspacing=0.8, handlelength=0.8)
        return
    scatter_predictions(ax, [run])
    made = [run.series(name) for name, _, _ in PREDICTIONS if len(run.series(name))]
    kinds = ", ".join(f"{correlation(series, measured):.2f}" for series in made)
    ax.set_title(f"change of H in a step (r = {kinds})", pad=18)


def scatter_predictions(ax: Axes, runs: Sequence[Run]) -> None:
    """The predictions over the measured change of entropy, a point a step of every run.

    All but the first are in nats: on the diagonal they were right.  The logit-space sum has no
    scale of its own and is drawn with the spread of what was measured.
    """
    ax.set_xlabel("measured [nats a token]")
    ax.set_ylabel("predicted (logit space: scaled)")
    ax.xaxis.set_major_locator(MaxNLocator(4))
    for name, label, colour in PREDICTIONS:
        pairs = [paired(run.series("dh_measured"), run.series(name)) for run in runs]
        x, y, _ = (np.concatenate(values) for values in zip(*pairs, strict=True))
        if not len(y):
            continue
        if name == "dh_predicted" and y.std() > 0:
            y = y * (x.std() / y.std())
        ax.scatter(x, y, s=12, alpha=0.6, color=colour, label=label)
    ax.axline((0, 0), slope=1, color=GREY, linewidth=0.8)
    ax.axhline(0, color=GREY, linewidth=0.8)
    ax.axvline(0, color=GREY, linewidth=0.8)
    ax.legend(
        loc="lower left", bbox_to_anchor=(-0.02, 1), ncols=3, columnspacing=0.6, handletextpad=0.1
    )
