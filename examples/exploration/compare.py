"""Does entropy pay?  Ways to keep it on easy and hard prompts, over seeds, in one report.

    python examples/exploration/compare.py [--seeds 10 11 12] [--arms static hi] [--report]
        [--jobs 2] [--out FOLDER] [key=value ...]

Runs go side by side, one process each.  A run that is finished is not made again; one that was
interrupted continues.  They lie in runs/exploration-compare/ARM-SEED; report.md and pictures beside
them.  With --report no run is made: the report is of those that are finished.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1]))  # for what examples share
from comparison import Arm, comparison_parser, run_comparison, written  # noqa: E402
from findings import (  # noqa: E402
    STATIC,
    Number,
    Seed,
    at_end,
    difference,
    draw_over_steps,
    draw_pass_at_k,
    held_out_numbers,
    in_all,
    mean_entropy,
    paired_tables,
)

CONFIG = Path(__file__).with_name("config.yaml")
OUT = Path(__file__).parents[2] / "runs" / "exploration-compare"
ARMS = {
    STATIC: ("clip.schedule=static",),
    "id": ("clip.schedule=id",),
    "hi": ("clip.schedule=hi",),
    "clip-higher": ("clip.schedule=static", "clip.eps_high=0.28"),
    "wide": ("clip.schedule=static", "clip.eps_high=0.5"),
    "bonus": ("clip.schedule=static", "train.entropy_coef=0.01"),
    "target": ("clip.schedule=target", "clip.target=100%"),
    "id-late": ("clip.schedule=id", "clip.phase_split=0.8"),
}
TITLES = {
    STATIC: "static 0.2",
    "id": "ID",
    "hi": "Hi(p) throughout",
    "clip-higher": "clip-higher 0.28",
    "wide": "upper bound 0.5",
    "bonus": "entropy bonus 0.01",
    "target": "target: the first entropy",
    "id-late": "ID, split 0.8",
}
SOLVED = at_end("eval_solved")
PANELS = {
    "entropy": "entropy [nats a token]",
    "reward_hard": "reward on hard prompts",
    "reward_easy": "reward on easy prompts",
}


def main() -> int:
    parser = comparison_parser(__doc__, range(10, 20), OUT)
    parser.add_argument("--arms", choices=ARMS, nargs="+", default=list(ARMS))
    return run_comparison(parser, arms_of, written(report))


def arms_of(given: argparse.Namespace) -> dict[str, Arm]:
    return {arm: Arm(CONFIG, ["plots=false"], ARMS[arm]) for arm in given.arms}


def report(seeds: Sequence[Seed], out: Path) -> str:
    """Markdown, and its pictures in `out`."""
    arms = in_all(seeds, list(ARMS))
    samples = next(iter(seeds[0].values())).config["eval.samples"]
    draw_over_steps(seeds, TITLES, arms, PANELS, out / "steps.png")
    draw_pass_at_k(seeds, TITLES, arms, samples, out / "pass_at_k.png")
    numbers: dict[str, Number] = {
        "solved": SOLVED,
        **held_out_numbers(samples),
        "easy prompts' reward": lambda run: run.series("reward_easy").last(),
        "entropy, mean": mean_entropy,
    }
    numbers.pop("held-out reward")  # pass@1 by another name
    return "\n\n".join(
        [
            "# Does entropy pay?",
            headline(seeds, arms),
            "Held-out hard prompts after the last step; *solved*: at least half of the samples are "
            "right. Means over seeds ± half a 95 % interval (Student's t); differences are taken "
            "seed by seed.",
            paired_tables(seeds, TITLES, arms, numbers),
            "![over steps](steps.png)\n\n![pass@k](pass_at_k.png)\n",
        ]
    )


def headline(seeds: Sequence[Seed], arms: Sequence[str]) -> str:
    """Which arms solve more hard prompts than static clipping, those that do not first."""
    found = {arm: difference(seeds, arm, STATIC, SOLVED) for arm in arms if arm != STATIC}
    known = {arm: d for arm, d in found.items() if d.seeds > 1}
    if not known:
        return "Two seeds of static clipping and of another arm are needed to say anything."
    kinds = {
        "Worse than static clipping": [a for a, d in known.items() if d.mean < -d.half],
        "Not shown to be better or worse": [a for a, d in known.items() if abs(d.mean) <= d.half],
        "Better than static clipping": [a for a, d in known.items() if d.mean > d.half],
    }
    return "Share of hard prompts solved, minus that under static clipping:\n\n" + "\n".join(
        f"- **{kind}**: "
        + ("; ".join(f"{TITLES[a]} ({known[a]}, {known[a].seeds} seeds)" for a in of) or "none")
        for kind, of in kinds.items()
    )


if __name__ == "__main__":
    sys.exit(main())
