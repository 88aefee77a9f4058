"""The pictures on README's front page, drawn from the project's own algo/ and from `make compare`.

    python tools/front_pictures.py [--compare runs/compare] [--out docs/images]

method.png: the thresholds Hi(p) and Lo(p), and the four regions.  id_static.png: ID against static
over all seeds that lie in the comparison's folder; left out if there are none.
"""

from __future__ import annotations

import math
import sys
from pathlib import Path

import matplotlib as mpl
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from megatron_gpc.algo.clipping import affine_bounds
from megatron_gpc.algo.regions import region_masks
from megatron_gpc.cli import Parser, exit_code
from megatron_gpc.config import ClipConfig
from megatron_gpc.metrics.panels import BLACK, BLUE, GREY, ORANGE, RED, SKY, STYLE, save_figure
from megatron_gpc.metrics.plots import groups_figure
from megatron_gpc.metrics.runs import group_runs, load_run

ROOT = Path(__file__).parents[1]
ENTROPY = 0.9
"""Of the policy in the picture of regions [nats]."""
REGIONS = (  # words, colour, sign of the advantage, and where the words stand
    ("E1 likely, A > 0", ORANGE, +1, (0.8, -0.2)),
    ("E2 unlikely, A > 0", BLUE, +1, (0.2, 0.3)),
    ("E3 likely, A < 0", SKY, -1, (0.8, 0.2)),
    ("E4 unlikely, A < 0", RED, -1, (0.2, -0.3)),
)


def main() -> int:
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--compare", type=Path, default=ROOT / "runs" / "compare")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "images")
    given = parser.parse_args()
    folders = [run for arm in ("static", "id") for run in sorted(given.compare.glob(f"{arm}-*/"))]
    print(save_figure(method_figure(), given.out / "method.png"))
    if folders:
        groups = group_runs([load_run(folder) for folder in folders])
        panels = {"entropy": "entropy [nats a token]", "reward": "reward"}
        print(save_figure(groups_figure(groups, panels), given.out / "id_static.png"))
    else:
        print(f"{given.compare} has no runs: `make compare` makes them", file=sys.stderr)
    return 0


def method_figure() -> Figure:
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(10, 3.6), layout="constrained")
        left, right = figure.subplots(1, 2)
        _thresholds(left)
        _regions(right)
    return figure


def _thresholds(ax: Axes) -> None:
    clip = ClipConfig()
    standard = affine_bounds((0.0, clip.eps_high), (0.0, clip.eps_low))
    moved = affine_bounds((clip.hi_slope, clip.hi_intercept), (clip.lo_slope, clip.lo_intercept))
    ends = (0.0, 1.0)
    std_high, std_low = ([f(p) for p in ends] for f in (standard.eps_high_at, standard.eps_low_at))
    hi, lo = ([f(p) for p in ends] for f in (moved.eps_high_at, moved.eps_low_at))
    ax.set_title("how far a token's probability may move in a step")
    ax.set_xlabel("p, the token's probability")
    ax.set_ylabel("ratio new / old")
    ax.axhline(1, color=GREY, linewidth=0.8)
    above = [[1 + eps for eps in side] for side in (std_high, hi)]
    below = [[1 - eps for eps in side] for side in (std_low, lo)]
    ax.fill_between(ends, *above, color=BLUE, alpha=0.2, linewidth=0)
    ax.fill_between(ends, *below, color=RED, alpha=0.2, linewidth=0)
    for side in (above[0], below[0]):
        ax.plot(ends, side, color=BLACK, linewidth=1.2, linestyle="--")
    ax.plot(ends, above[1], color=BLUE)
    ax.plot(ends, below[1], color=RED)
    for text, at, colour in (
        ("Hi(p): unlikely tokens may grow, entropy rises", (0.30, 1.45), BLUE),
        ("standard: 1 ± 0.2", (0.62, 1.07), BLACK),
        ("Lo(p): unlikely tokens may shrink, entropy falls", (0.26, 0.70), RED),
    ):
        ax.annotate(text, at, color=colour, fontsize=8.5)
    ax.set_xlim(0, 1)
    ax.set_ylim(0.62, 1.55)


def _regions(ax: Axes) -> None:
    """The token's own part of the change of entropy, -A p (ln p + H), by region."""
    p = torch.linspace(1e-3, 1.0, 1000)
    ax.set_title("which way a token's gradient moves entropy")
    ax.set_xlabel("p, the token's probability")
    ax.set_ylabel("change of entropy")
    ax.axhline(0, color=GREY, linewidth=0.8)
    ax.axvline(math.exp(-ENTROPY), color=GREY, linewidth=0.8, linestyle=(0, (4, 3)))
    for sign in (+1, -1):
        dh = -sign * p * (p.log() + ENTROPY)
        masks = region_masks(p.log(), torch.full_like(p, ENTROPY), torch.full_like(p, sign))
        for (words, colour, its_sign, at), mask in zip(REGIONS, masks, strict=True):
            if its_sign == sign:
                ax.plot(p[mask], dh[mask], color=colour)
                ax.fill_between(p[mask], dh[mask], color=colour, alpha=0.2, linewidth=0)
                look = {"ha": "center", "va": "center", "fontweight": "bold", "fontsize": 8.5}
                ax.annotate(words, at, color=colour, **look)
    ax.annotate(
        "-ln p = H ", (math.exp(-ENTROPY), -0.97), color=GREY, fontsize=8, ha="right", va="bottom"
    )
    ax.annotate("entropy rises", (0.45, 0.9), color=BLACK, fontsize=8.5, va="top")
    ax.annotate("entropy falls", (0.45, -0.9), color=BLACK, fontsize=8.5, va="bottom")
    ax.set_xlim(0, 1)
    ax.set_ylim(-1, 1)
    ax.set_yticks([])


if __name__ == "__main__":
    sys.exit(exit_code(main))
