"""The study's report: Markdown with pictures, and the same as one HTML file.

Every sentence that says what was found is put together from the numbers.
"""

from __future__ import annotations

import base64
import math
import re
from collections.abc import Sequence
from pathlib import Path

import markdown
import matplotlib as mpl
from arms import (
    COIN_SETTINGS,
    COINS,
    NOISE,
    PARTS,
    REGIONS,
    SCHEDULES,
    THRESHOLDS,
    TITLES,
    coin_arm,
    sums_arm,
)
from claims import (
    END,
    FRESH_SEEDS,
    MIDDLE,
    START,
    Verdict,
    drift,
    entropy_change,
    fit,
    judge,
    moved,
)
from findings import (
    STATIC,
    Number,
    Seed,
    difference,
    draw_over_steps,
    held_out_numbers,
    in_all,
    markdown_table,
    mean_entropy,
    over,
    paired_tables,
)
from matplotlib.figure import Figure

from megatron_gpc.metrics.intervals import Interval
from megatron_gpc.metrics.panels import STYLE, save_figure
from megatron_gpc.metrics.region_panels import PREDICTIONS, scatter_predictions
from megatron_gpc.run.files import write_output

ENTROPY = {"entropy": "entropy [nats a token]", "reward": "reward"}
CLIPPED = {
    "clip_fraction_low": "tokens clipped at the lower bound",
    "clip_fraction_high": "tokens clipped at the upper bound",
}
FIGURES = (  # file, title, arms, panels
    ("a_regions", "(a) One region at a time", REGIONS, ENTROPY),
    ("b_thresholds", "(b) Hi(p) and Lo(p) alone", THRESHOLDS, ENTROPY | CLIPPED),
    ("c_schedules", "(c) Schedules", SCHEDULES, ENTROPY | CLIPPED),
)
NUMBERS: dict[str, Number] = {
    "entropy, mean": mean_entropy,
    "entropy, end - start": entropy_change,
    "clipped below, %": lambda run: 100 * run.series("clip_fraction_low").mean(),
    "clipped above, %": lambda run: 100 * run.series("clip_fraction_high").mean(),
}
CSS = """body{font:16px/1.5 sans-serif;max-width:64rem;margin:2rem auto;padding:0 1rem;color:#333}
table{border-collapse:collapse;font-size:.85rem;display:block;overflow-x:auto}
td,th{padding:.2rem .6rem;border-bottom:1px solid #ddd;text-align:left}
img{max-width:100%}code{background:#f4f4f4;padding:.1rem .2rem}"""


def write_report(seeds: Sequence[Seed], out: Path, command: str) -> Path:
    """Write OUT/report.md with its pictures and OUT/report.html; returns the latter.

    Args:
        seeds: the runs of each seed that are there.
        command: what made them.

    Raises:
        UserError: a file cannot be written.
    """
    verdicts = judge(seeds)
    sections = [
        "# Which tokens move entropy: the paper's claims where most of the advantage is noise",
        _headline(verdicts),
        _verdict_table("What does not reproduce", [v for v in verdicts if _failed(v)]),
        _verdict_table("What reproduces", [v for v in verdicts if v.holds]),
        _unmeasured(verdicts),
        _setting(seeds, command),
        *(_part(seeds, out, *figure) for figure in FIGURES),
        _predictions(seeds, out),
        _noise(seeds, out),
        _coins(seeds),
        _outcomes(seeds),
    ]
    text = "\n\n".join(section for section in sections if section) + "\n"
    write_output(out / "report.md", text)
    return write_output(out / "report.html", _html(text, out))


def _html(text: str, out: Path) -> str:
    """One file: pictures are inside."""

    def inline(found: re.Match[str]) -> str:
        content = base64.b64encode((out / found[1]).read_bytes()).decode()
        return f'src="data:image/png;base64,{content}"'

    body = re.sub(r'src="([^"]+\.png)"', inline, markdown.markdown(text, extensions=["tables"]))
    title = text.split("\n", 1)[0].lstrip("# ")
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}</title>'
        f"<style>{CSS}</style><body>{body}</body></html>\n"
    )


# --- what was found ---------------------------------------------------------------------------


def _failed(verdict: Verdict) -> bool:
    return not verdict.holds and verdict.word != "not measured"


def _headline(verdicts: Sequence[Verdict]) -> str:
    words = dict.fromkeys(["opposite", "not shown", "reproduced", *(v.word for v in verdicts)])
    counts = {word: sum(v.word == word for v in verdicts) for word in words}
    said = ", ".join(f"{count} {word}" for word, count in counts.items() if count)
    return (
        f"Of {len(verdicts)} claims: {said}. *Reproduced* and *opposite* mean that the 95 % "
        "interval over seeds leaves out 0, on the claimed or on the other side; *not shown* that "
        "it does not. (Of 20 such intervals around nothing, one leaves out 0 by chance.)"
    )


def _verdict_table(title: str, verdicts: Sequence[Verdict]) -> str:
    if not verdicts:
        return f"## {title}\n\nNothing."
    order = ("opposite", "not shown")
    ranked = sorted(verdicts, key=lambda v: order.index(v.word) if v.word in order else len(order))
    rows = [
        (
            *(f"({v.claim.part})", v.claim.text, "> 0" if v.claim.sign > 0 else "< 0"),
            *(_exact(v.found), v.found.seeds, v.word),
        )
        for v in ranked
    ]
    return f"## {title}\n\n" + markdown_table(["", "claim", "claimed", "found", "seeds", ""], rows)


def _exact(found: Interval) -> str:
    """Small numbers, such as a drift in one update, with digits that show them."""
    if 0 < abs(found.mean) < 0.01:
        return f"{found.mean:.2g} ± {found.half:.1g}"
    return str(found)


def _unmeasured(verdicts: Sequence[Verdict]) -> str:
    missing = [v.claim.text for v in verdicts if v.word == "not measured"]
    if not missing:
        return ""
    return "## Not measured yet\n\n" + "\n".join(f"- {text}" for text in missing)


def _setting(seeds: Sequence[Seed], command: str) -> str:
    """What the runs say of themselves."""
    runs = [run for seed in seeds for run in seed.values()]
    tasks = dict.fromkeys(
        f"examples/{part.config.parent.name}"
        for part in PARTS.values()
        if in_all(seeds, list(part.arms))
    )

    def every(*keys: str) -> str:
        """A number of the runs, the product of these keys: `16`, or `8 to 16` if they differ."""
        found = [math.prod(run.config[key] for key in keys) for run in runs]
        low, high = min(found), max(found)
        return f"{low:g}" if low == high else f"{low:g} to {high:g}"

    numbers = sorted({run.seed for run in runs})
    seen = [str(seed) for seed in numbers if seed not in FRESH_SEEDS]
    return "\n".join(
        [
            "## Setting",
            "",
            f"    {command}",
            "",
            f"{len(runs)} runs of {' and '.join(tasks)}, seeds {', '.join(map(str, numbers))}: "
            f"{every('train.steps')} steps, {every('rollout.prompts_per_step')} prompts x "
            f"{every('rollout.group_size')} samples a step, "
            f"{every('train.mini_batches', 'train.epochs')} updates a rollout, Adam "
            f"{every('optim.lr')}, TP {every('parallel.tp')}, PP {every('parallel.pp')}. "
            + (
                f"Of seeds {', '.join(seen)} it is not known that they had no part in choosing the "
                if seen
                else "No seed was used for choosing the "
            )
            + "task, its settings or the claims' windows.",
            "",
            "Numbers are means over seeds ± half a 95 % interval (Student's t); differences are "
            "taken seed by seed. Windows are shares of a run. In pictures bands are one standard "
            "deviation, thin lines single runs. Entropy is exact, in nats, over all response "
            "tokens of a step's samples.",
        ]
    )


# --- parts ------------------------------------------------------------------------------------


def _part(
    seeds: Sequence[Seed],
    out: Path,
    name: str,
    title: str,
    arms: Sequence[str],
    panels: dict[str, str],
) -> str:
    if not in_all(seeds, arms):
        return ""
    draw_over_steps(seeds, TITLES, arms, panels, out / f"{name}.png")
    text = f"## {title}\n\n![{title}]({name}.png)\n\n"
    return text + paired_tables(seeds, TITLES, arms, NUMBERS)


def _predictions(seeds: Sequence[Seed], out: Path) -> str:
    """(d): predicted against measured change of entropy."""
    measured = [
        {arm: run for arm, run in s.items() if len(run.series("dh_measured"))} for s in seeds
    ]
    arms = in_all(measured, ["static", "id", *REGIONS, sums_arm(0, STATIC)])
    if not arms:
        return ""
    with mpl.rc_context(STYLE):
        rows = -(-len(arms) // 3)
        figure = Figure(figsize=(11, 0.6 + 3 * rows), layout="constrained")
        axes = figure.subplots(rows, min(3, len(arms)), squeeze=False).flatten()
        for ax, arm in zip(axes, arms, strict=False):
            scatter_predictions(ax, [seed[arm] for seed in measured if arm in seed])
            ax.set_title(TITLES[arm], pad=18)
        for ax in axes[len(arms) :]:
            ax.set_axis_off()
    save_figure(figure, out / "d_predictions.png")
    found = [
        (TITLES[arm], *(over(measured, arm, _fit_of(name)) for name, _, _ in PREDICTIONS))
        for arm in arms
    ]
    return (
        "## (d) Predicted and measured change of entropy\n\n"
        "Pearson's r over the steps of a run, of the change of mean entropy on a step's own "
        "samples over its updates. *Logit space*: the sum of <dJ/dx, dH/dx> over tokens and "
        "updates, baseline term included; it takes every token's logits for free. *First order*: "
        "the exact directional derivative along the change of the weights that was "
        "really made. *Second order*: curvature along it as well.\n\n"
        "![predictions](d_predictions.png)\n\n"
        + markdown_table(["", *(f"r, {label}" for _, label, _ in PREDICTIONS)], found)
    )


def _fit_of(predicted: str) -> Number:
    return lambda run: fit(run, predicted)


def _noise(seeds: Sequence[Seed], out: Path) -> str:
    """(e): the sums, where there is much to learn, under rewards that are more and more noise."""
    title = "## (e) Why the sums do not show it: noise\n\n"
    rows, pictures = [], []
    for share in NOISE:
        static = sums_arm(share, STATIC)
        shown = [sums_arm(share, arm) for arm in ("static", "hi", "lo", "id")]
        if in_all(seeds, shown):
            pictures.append(f"e_noise_{100 * share:g}.png")
            draw_over_steps(seeds, TITLES, shown, ENTROPY, out / pictures[-1])
        ids = sums_arm(share, "id")
        rows.append(
            (
                f"{share:g}",
                over(seeds, static, lambda run: run.series("signal_share").mean()),
                *(
                    difference(seeds, sums_arm(share, arm), static, mean_entropy)
                    for arm in ("hi", "lo", "id")
                ),
                over(seeds, ids, lambda run: moved(run, START, MIDDLE)),
                over(seeds, ids, lambda run: moved(run, MIDDLE, END)),
            )
        )
    if not pictures:
        return title + _command_for("noise")
    return (
        title + "On examples/arithmetic, a share of the answers gets a coin for a reward. "
        "*Signal share* is the cosine of the gradients of two halves of a step's prompts "
        "(docs/entropy.md).\n\n"
        + "".join(f"![noise]({picture})\n\n" for picture in pictures)
        + markdown_table(
            [
                *("share of coins", "signal share", "Hi - static", "Lo - static", "ID - static"),
                *("ID, phase 1", "ID, phase 2"),
            ],
            rows,
        )
    )


def _coins(seeds: Sequence[Seed]) -> str:
    """(f): what clipping alone does to entropy, where no reward says anything."""
    title = "## (f) Clipping alone: a coin for a reward\n\n"
    arms = {setting: [coin_arm(setting, arm) for arm in COINS] for setting in COIN_SETTINGS}
    there = in_all(seeds, [arm for of in arms.values() for arm in of])
    if not there:
        return title + _command_for("coin")
    steps = next(seed[there[0]].steps for seed in seeds if there[0] in seed)
    rows = [
        (
            *(setting.text, f"{setting.lr:g}"),
            *(_scaled(over(seeds, coin_arm(setting, arm), drift), 1e3) for arm in COINS),
            *(
                _scaled(over(seeds, coin_arm(setting, arm), drift), 1 / setting.lr)
                for arm in ("static",)
            ),
        )
        for setting in COIN_SETTINGS
    ]
    return (
        title + "The main task with a coin for a reward: nothing can be learned, and what entropy "
        "does is the clip's own doing (arXiv 2509.26114: a lower bound raises entropy, an upper "
        f"one lowers it). Slope of entropy over {steps} steps, in thousandths of a nat a token for "
        "each update; last column: static's, in nats for each update and unit of learning rate.\n\n"
        + markdown_table(
            ["updates a rollout", "Adam", *COINS.values(), "static / learning rate"], rows
        )
    )


def _scaled(found: Interval, factor: float) -> Interval:
    return Interval(found.mean * factor, found.half * factor, found.seeds)


def _command_for(part: str) -> str:
    return f"Not measured yet: `python examples/entropy_study/study.py --parts {part}`."


def _outcomes(seeds: Sequence[Seed]) -> str:
    """(g): held-out figures of every arm, and their differences from static."""
    arms = [
        arm
        for arm in (*THRESHOLDS, *SCHEDULES)
        if any(len(seed[arm].series("eval_reward")) for seed in seeds if arm in seed)
    ]
    arms = list(dict.fromkeys(arms))
    if not arms:
        return ""
    first = next(seed[arms[0]] for seed in seeds if arms[0] in seed)
    return (
        "## (g) Reward\n\n"
        "Half of it is luck whatever the policy does, so nothing can be learned from it about what "
        "entropy is worth: examples/exploration asks that. After the last step, on held-out "
        f"prompts with {first.config['eval.samples']} samples each:\n\n"
        + paired_tables(seeds, TITLES, arms, held_out_numbers(first.config["eval.samples"]))
    )
