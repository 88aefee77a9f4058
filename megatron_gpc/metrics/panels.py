"""What all pictures of runs share: colours, style, and the parts that panels are made of.

Colours are Okabe and Ito's, which the colour-blind tell apart; steps are on matplotlib's viridis.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from megatron_gpc.errors import UserError
from megatron_gpc.metrics.runs import Run, Series

BLUE, ORANGE, GREEN, RED = "#0072B2", "#E69F00", "#009E73", "#D55E00"
PINK, SKY, BLACK, GREY = "#CC79A7", "#56B4E9", "#333333", "#8C8C8C"
GROUP_COLOURS = (BLUE, RED, GREEN, PINK, ORANGE, SKY, BLACK, GREY)
FEW = 12
"""Series up to this length are drawn with their points."""
STYLE: Any = {
    "font.size": 9,
    "axes.titlesize": 9.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": GREY,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#E8E8E8",
    "grid.linewidth": 0.8,
    "xtick.color": BLACK,
    "ytick.color": BLACK,
    "lines.linewidth": 1.8,
    "lines.markersize": 5,
    "legend.fontsize": 8,
    "legend.framealpha": 0.8,
    "legend.edgecolor": "none",
    "legend.handlelength": 1.4,
    "legend.borderpad": 0.2,
    "legend.borderaxespad": 0.3,
    "figure.titlesize": 11,
    "savefig.dpi": 130,
}


def start_panel(ax: Axes, title: str, run: Run) -> None:
    """Title, the whole run as x axis, and where phase 2 begins."""
    ax.set_title(title)
    ax.set_xlabel("step")
    ax.set_xlim(0, run.steps)
    mark_phase(ax, run.phase_boundary)


def mark_phase(ax: Axes, boundary: float | None) -> None:
    if boundary is not None:
        ax.axvline(boundary, color=GREY, linewidth=1, linestyle=(0, (4, 3)), label="_phase")


def trace(ax: Axes, series: Series, colour: str, label: str | None = None) -> None:
    """A noisy metric: single steps light, their running mean strong."""
    if not len(series):
        say_missing(ax)
        return
    if series.window > 1:
        line(ax, series, color=colour, alpha=0.3, linewidth=0.9)
    line(ax, series.smooth(), color=colour, label=label)


def points(ax: Axes, series: Series, colour: str, label: str | None = None) -> None:
    """A metric of few steps, such as evaluations: every one is a point; the line joins them."""
    ax.plot(
        series.steps,
        series.values,
        color=colour,
        label=label,
        marker="o",
        linewidth=1.2,
        linestyle=":",
        clip_on=False,
        zorder=3,
    )


def line(ax: Axes, series: Series, **look: Any) -> None:
    """A line; few values are points as well, because of a single one a line shows nothing."""
    few = 0 < len(series) <= FEW
    ax.plot(series.steps, series.values, marker="o" if few else None, clip_on=not few, **look)


def percent(share: float, _position: float) -> str:
    return f"{100 * share:g} %"


def say_missing(ax: Axes) -> None:
    ax.text(0.5, 0.5, "not recorded", transform=ax.transAxes, ha="center", va="center", color=GREY)


def save_figure(figure: Figure, out: Path) -> Path:
    """Write a picture; returns `out`.

    Raises:
        UserError: matplotlib knows no such format, or the file cannot be written.
    """
    formats = figure.canvas.get_supported_filetypes()
    if out.suffix.lstrip(".").lower() not in formats:
        raise UserError(f"{out}: a picture's name ends in one of {', '.join(formats)}")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with mpl.rc_context(STYLE):  # ticks are made as late as now
            figure.savefig(out)
    except OSError as error:
        raise UserError(f"{out}: the picture cannot be written: {error.strerror}") from None
    return out
