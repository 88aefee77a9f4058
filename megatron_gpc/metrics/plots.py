"""Pictures of one run and of several over each other, from metrics.jsonl and config.yaml alone."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from megatron_gpc.errors import UserError
from megatron_gpc.metrics.panels import (
    BLACK,
    BLUE,
    GREY,
    GROUP_COLOURS,
    ORANGE,
    RED,
    SKY,
    STYLE,
    line,
    mark_phase,
    percent,
    points,
    save_figure,
    say_missing,
    start_panel,
    trace,
)
from megatron_gpc.metrics.region_panels import dh_panel, prediction_panel, share_panel
from megatron_gpc.metrics.runs import PLOT_NAME, Run, SeedGroup, Series, group_runs, load_run

MOST_LINES = 40
"""Runs that a panel draws one by one; of more it draws each group's mean and spread alone."""
EVAL_TITLES = {
    "eval_reward": "held-out reward",
    "eval_distinct_right": "distinct right answers a prompt",
}


def plot_run(run_dir: Path, out: Path | None = None) -> Path:
    """Draw one run; returns the picture's path (`out`, or plots.png in the run's folder).

    Raises:
        UserError: not a run directory, or one without any training step; `out` cannot be written.
    """
    out = Path(run_dir) / PLOT_NAME if out is None else Path(out)
    return save_figure(run_figure(load_run(run_dir)), out)


def plot_runs(run_dirs: Sequence[Path], out: Path) -> Path:
    """Draw several runs over each other, pooled over seeds; returns `out`.

    Raises:
        UserError: as `plot_run`.
    """
    return save_figure(overlay_figure([load_run(run_dir) for run_dir in run_dirs]), Path(out))


def run_figure(run: Run) -> Figure:
    """Twelve panels.  Light lines are the values of single steps, strong ones a mean over 5 %."""
    _check_has_steps(run)
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(11, 11), layout="constrained")
        axes = figure.subplots(4, 3).flat
        _entropy_panel(next(axes), run)
        _reward_panel(next(axes), run)
        _diversity_panel(next(axes), run)
        steered = len(run.series("clip_lambda")) > 0
        (_lambda_panel if steered else _bounds_over_p_panel)(next(axes), run)
        _bounds_over_steps_panel(next(axes), run)
        _clip_panel(next(axes), run)
        share_panel(next(axes), run, "share", "tokens by region (rest: A = 0)")
        _one_metric_panel(next(axes), run, "grad_norm", "gradient norm")
        _one_metric_panel(next(axes), run, "ratio_max", "largest importance ratio")
        share_panel(next(axes), run, "gradient_share", "the gradient's mass by region")
        dh_panel(next(axes), run)
        prediction_panel(next(axes), run)
        figure.suptitle(f"{run.schedule}, seed {run.seed} ({run.folder.name})", x=0.01, ha="left")
    return figure


def overlay_figure(runs: Sequence[Run]) -> Figure:
    """What to look at first when runs are compared, pooled over their seeds."""
    evaluated = [name for name in EVAL_TITLES if any(len(run.series(name)) for run in runs)]
    panels = {
        "entropy": "entropy [nats a token]",
        "reward": "reward",
        "clip_fraction_high": "tokens clipped at the upper bound",
        "clip_fraction_low": "tokens clipped at the lower bound",
        **{name: EVAL_TITLES[name] for name in evaluated},
    }
    return groups_figure(group_runs(runs), panels)


def groups_figure(groups: Sequence[SeedGroup], panels: Mapping[str, str]) -> Figure:
    """One panel a metric, one colour a group: mean over seeds, a band of one standard deviation,
    and every run as a thin line.

    Args:
        panels: metric -> title.
    """
    for group in groups:
        for run in group.runs:
            _check_has_steps(run)
    columns = min(3, len(panels)) if len(panels) != 4 else 2
    rows = -(-len(panels) // columns)
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(11 if columns == 3 else 8, 0.6 + 2.7 * rows), layout="constrained")
        axes = figure.subplots(rows, columns, squeeze=False).flatten()
        for ax, (name, title) in zip(axes, panels.items(), strict=False):
            _overlay_panel(ax, groups, name, title)
        for ax in axes[len(panels) :]:
            ax.set_axis_off()
        handles, labels = axes[0].get_legend_handles_labels()
        in_a_row = max(1, 150 // max(len(label) + 6 for label in labels))
        figure.legend(handles, labels, loc="outside upper left", ncols=in_a_row)
    return figure


# --- panels of one run ------------------------------------------------------------------------


def _entropy_panel(ax: Axes, run: Run) -> None:
    start_panel(ax, "entropy [nats a token]", run)
    target = run.series("entropy_target")
    trace(ax, run.series("entropy"), BLUE, "measured")
    if len(target):
        line(ax, target, color=BLACK, linewidth=1.2, linestyle="--", label="target")
        ax.legend(loc="lower left")
    ax.set_ylim(bottom=0)
    if run.phase_boundary is not None:
        ax.annotate(
            "phase 2",
            (run.phase_boundary, 1),
            xycoords=("data", "axes fraction"),
            xytext=(3, -2),
            textcoords="offset points",
            va="top",
            color=GREY,
            fontsize=8,
        )


def _reward_panel(ax: Axes, run: Run) -> None:
    start_panel(ax, "reward", run)
    trace(ax, run.series("reward"), BLUE, "training prompts")
    held_out = run.series("eval_reward")
    if len(held_out):
        points(ax, held_out, RED, "held-out prompts")
        ax.legend(loc="lower right")


def _diversity_panel(ax: Axes, run: Run) -> None:
    """Distinct right answers if they were counted, else the length of responses."""
    distinct = run.series("eval_distinct_right")
    if len(distinct):
        start_panel(ax, "distinct right answers a prompt", run)
        points(ax, distinct, RED)
        ax.set_ylim(bottom=0)
    else:
        _one_metric_panel(ax, run, "response_length", "response length [tokens]")


def _lambda_panel(ax: Axes, run: Run) -> None:
    """How far a steered run opened which threshold: 1 is Hi(p), -1 is Lo(p)."""
    start_panel(ax, "lambda: Hi(p) at 1, Lo(p) at -1", run)
    ax.axhline(0, color=GREY, linewidth=0.8)
    line(ax, run.series("clip_lambda"), color=BLUE)
    ax.set_ylim(-1.08, 1.08)


def _bounds_over_p_panel(ax: Axes, run: Run) -> None:
    """The interval of the ratio at up to five steps: earlier ones are drawn thicker, so that lines
    which coincide are seen inside each other."""
    ax.set_title("ratio bounds over p")
    ax.set_xlabel("p, current probability of the token")
    ax.set_xlim(0, 1)
    ax.axhline(1, color=GREY, linewidth=0.8)
    bounds = _bounds(run)
    if not bounds:
        say_missing(ax)
        return
    (_, *at_p0), _, (_, *at_p1) = bounds
    steps = at_p0[0].steps
    colours = ScalarMappable(Normalize(0, run.steps), "viridis_r")
    shown = np.unique(np.linspace(0, len(steps) - 1, 5).round().astype(int))
    for number, i in enumerate(shown):
        for left, right in zip(at_p0, at_p1, strict=True):  # affine in p: two ends are the line
            ax.plot(
                [0, 1],
                [left.values[i], right.values[i]],
                color=colours.to_rgba(steps[i]),
                linewidth=4.2 - 0.75 * number,
            )
    bottom, top = ax.get_ylim()
    ax.set_ylim(bottom, top)
    scale = ax.inset_axes((0.3, (_between(at_p1[1]) - bottom) / (top - bottom), 0.6, 0.03))
    scale.set_in_layout(False)
    ax.figure.colorbar(
        colours, cax=scale, orientation="horizontal", ticks=MaxNLocator(4, integer=True)
    )
    scale.tick_params(labelsize=8, length=2)
    scale.set_title("step", loc="left", x=-0.2, y=-1.2, fontsize=8, fontweight="normal")


def _bounds_over_steps_panel(ax: Axes, run: Run) -> None:
    start_panel(ax, "ratio bounds over steps", run)
    ax.axhline(1, color=GREY, linewidth=0.8)
    bounds = _bounds(run)
    if not bounds:
        say_missing(ax)
        return
    _, _, lowest = bounds[-1]
    looks = ((BLUE, 3.4), (SKY, 2.3), (ORANGE, 1.2))
    for (label, upper, lower), (colour, width) in zip(bounds, looks, strict=True):
        line(ax, upper, color=colour, linewidth=width, label=label)
        line(ax, lower, color=colour, linewidth=width)
    ax.legend(
        loc="center",
        bbox_to_anchor=(0.5, _between(lowest)),
        ncols=3,
        bbox_transform=ax.get_yaxis_transform(),
    )


def _clip_panel(ax: Axes, run: Run) -> None:
    start_panel(ax, "tokens clipped", run)
    trace(ax, run.series("clip_fraction_high"), RED, "at the upper bound")
    trace(ax, run.series("clip_fraction_low"), BLUE, "at the lower bound")
    ax.yaxis.set_major_formatter(percent)
    ax.margins(y=0.25)  # room for the legend
    ax.set_ylim(bottom=0)
    if ax.get_legend_handles_labels()[0]:
        ax.legend(loc="upper left", ncols=2)


def _one_metric_panel(ax: Axes, run: Run, name: str, title: str) -> None:
    start_panel(ax, title, run)
    trace(ax, run.series(name), BLUE)


def _bounds(run: Run) -> list[tuple[str, Series, Series]]:
    """Upper and lower bound of the ratio over steps, 1 + eps_plus and 1 - eps_minus, at p = 0, 0.5
    and 1; empty if one of them was not recorded at every step."""
    found = []
    for at, label in (("p0", "p = 0"), ("p05", "p = 0.5"), ("p1", "p = 1")):
        high, low = (run.series(f"eps_{side}_at_{at}").known() for side in ("high", "low"))
        upper, lower = Series(high.steps, 1 + high.values), Series(low.steps, 1 - low.values)
        found.append((label, upper, lower))
    lengths = {len(series) for _, *pair in found for series in pair}
    return found if len(lengths) == 1 and 0 not in lengths else []


def _between(lower: Series) -> float:
    """A height at which nothing is drawn, half-way between 1 and the lower bounds."""
    return (1 + float(np.nanmax(lower.values))) / 2


# --- panels of several runs -------------------------------------------------------------------


def _overlay_panel(ax: Axes, groups: Sequence[SeedGroup], name: str, title: str) -> None:
    ax.set_title(title)
    ax.set_xlabel("step")
    apart = sum(len(group.runs) for group in groups) <= MOST_LINES
    for group, colour in zip(groups, itertools.cycle(GROUP_COLOURS), strict=False):
        for run in group.runs if apart else ():
            line(
                ax, run.series(name).smooth(), color=colour, alpha=0.35, linewidth=0.9, markersize=3
            )
        mean, spread = group.mean_over_seeds(name)
        ax.fill_between(
            mean.steps,
            mean.values - spread.values,
            mean.values + spread.values,
            color=colour,
            alpha=0.15,
            linewidth=0,
        )
        number = len(group.runs)
        target, _ = group.mean_over_seeds("entropy_target")
        if name == "entropy" and len(target):
            line(ax, target, color=BLACK, linewidth=1.2, linestyle="--", label="_target")
        line(
            ax,
            mean,
            color=colour,
            linewidth=2.2,
            label=f"{group.label} ({number} seed{'s' * (number > 1)})",
        )
    boundaries = {run.phase_boundary for group in groups for run in group.runs} - {None}
    if len(boundaries) == 1:  # of several, a line would not say whose it is
        mark_phase(ax, boundaries.pop())
    ax.set_xlim(0, max(run.steps for group in groups for run in group.runs))
    if name == "entropy":
        ax.set_ylim(bottom=0)
    if name.startswith("clip_fraction"):
        ax.yaxis.set_major_formatter(percent)
    if not any(len(run.series(name)) for group in groups for run in group.runs):
        say_missing(ax)


def _check_has_steps(run: Run) -> None:
    if not len(run.series("reward")):
        raise UserError(f"{run.folder}: no training step has been written yet; nothing to draw")
