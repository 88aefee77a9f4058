"""The study's report: Markdown with pictures, and the same as one HTML file.

Every sentence that says what was found is put together from the numbers.
"""

from __future__ import annotations

import base64
import os
import platform
import re
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path

import markdown
import matplotlib as mpl
import torch
from claims import (
    Interval,
    Seed,
    Verdict,
    at_end,
    entropy_change,
    fit,
    interval,
    judge,
    mean_entropy,
)
from matplotlib.figure import Figure

from megatron_gpc.errors import UserError
from megatron_gpc.metrics.panels import GROUP_COLOURS, STYLE, save_figure
from megatron_gpc.metrics.pass_at_k import powers_of_two
from megatron_gpc.metrics.plots import groups_figure
from megatron_gpc.metrics.region_panels import PREDICTIONS, scatter_predictions
from megatron_gpc.metrics.runs import Run, SeedGroup

TITLES = {
    "static": "static 0.2",
    "clip-higher": "clip-higher 0.2 / 0.28",
    "e1": "E1 alone (likely, A > 0)",
    "e2": "E2 alone (unlikely, A > 0)",
    "e3": "E3 alone (likely, A < 0)",
    "e4": "E4 alone (unlikely, A < 0)",
    "hi": "Hi(p) alone",
    "lo": "Lo(p) alone",
    "id": "ID",
    "did": "DID",
    "od": "OD",
    "od-0.5": "OD, floor 0.5",
    "id-0.3": "ID, split 0.3",
    "id-0.4": "ID, split 0.4",
    "id-0.6": "ID, split 0.6",
}
OUTCOME = {
    "entropy": "entropy [nats a token]",
    "reward": "reward",
    "eval_distinct_right": "distinct right answers",
}
PARTS = (  # file, title, arms, panels
    (
        "a_regions",
        "(a) One region at a time",
        ("e1", "e2", "e3", "e4"),
        {"entropy": OUTCOME["entropy"], "reward": OUTCOME["reward"]},
    ),
    ("b_thresholds", "(b) Hi(p) and Lo(p) alone", ("static", "clip-higher", "hi", "lo"), OUTCOME),
    ("c_schedules", "(c) Schedules", ("static", "id", "did", "od", "od-0.5"), OUTCOME),
    ("d_split", "(d) Phase split of ID", ("id-0.3", "id-0.4", "id", "id-0.6"), OUTCOME),
)
CSS = """body{font:16px/1.5 sans-serif;max-width:64rem;margin:2rem auto;padding:0 1rem;color:#333}
table{border-collapse:collapse;font-size:.85rem;display:block;overflow-x:auto}
td,th{padding:.2rem .6rem;border-bottom:1px solid #ddd;text-align:left}
img{max-width:100%}code{background:#f4f4f4;padding:.1rem .2rem}"""


def write_report(seeds: Sequence[Seed], out: Path, command: str, seconds: float) -> Path:
    """Write OUT/report.md with its pictures and OUT/report.html; returns the latter.

    Args:
        seeds: the runs of each seed, the same arms for all.
        command: what made them.
        seconds: that it took.

    Raises:
        UserError: a file cannot be written.
    """
    verdicts = judge(seeds)
    sections = [
        "# Which tokens move entropy: the paper's claims on sums with many right answers",
        _headline(verdicts),
        _verdict_table("What does not reproduce", [v for v in verdicts if not v.holds]),
        _verdict_table("What reproduces", [v for v in verdicts if v.holds]),
        _setting(seeds, command, seconds),
        *(_part(seeds, out, *part) for part in PARTS),
        _outcomes(seeds, out),
        _predictions(seeds, out),
    ]
    text = "\n\n".join(section for section in sections if section) + "\n"
    try:
        (out / "report.md").write_text(text)
        (out / "report.html").write_text(_html(text, out))
    except OSError as error:
        raise UserError(f"{out}: the report cannot be written: {error.strerror}") from None
    return out / "report.html"


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


def _table(headings: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    lines = [headings, ["---"] * len(headings), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


# --- what was found ---------------------------------------------------------------------------


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
        (f"({v.claim.part})", v.claim.text, "> 0" if v.claim.sign > 0 else "< 0", v.found, v.word)
        for v in ranked
    ]
    return f"## {title}\n\n" + _table(["", "claim", "claimed", "found", ""], rows)


def _setting(seeds: Sequence[Seed], command: str, seconds: float) -> str:
    first = next(iter(seeds[0].values()))
    steps = sorted({run.steps for seed in seeds for run in seed.values()}, reverse=True)
    keys = ("rollout.prompts_per_step", "rollout.group_size", "train.mini_batches", "train.epochs")
    prompts, group, mini_batches, epochs = (first.config[key] for key in keys)
    runs = sum(map(len, seeds))
    over = f"{len(seeds)} seeds" if len(seeds) > 1 else "one seed"
    return "\n".join(
        [
            "## Setting",
            "",
            f"    {command}",
            "",
            f"{runs} runs over {over}, {timedelta(seconds=round(seconds))} on "
            f"{_machine()}. Runs of {' and '.join(map(str, steps))} steps; {prompts} prompts x "
            f"{group} samples a step, {mini_batches * epochs} updates a rollout, Adam "
            f"{first.config['optim.lr']:g}; one warm-up for all; TP 1, PP 1. Held-out figures are "
            f"of {first.config['eval.samples']} samples a prompt after the last step.",
            "",
            "Numbers are means over seeds ± half a 95 % interval (Student's t); differences are "
            "taken seed by seed. In pictures bands are one standard deviation, thin lines single "
            "runs. Entropy is exact, in nats, over all response tokens of a step's samples.",
        ]
    )


def _machine() -> str:
    file = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*: (.*)", file.read_text()) if file.exists() else []
    name = names[0] if names else platform.machine()
    return f"{os.cpu_count()} cores ({name}), torch {torch.__version__}"


# --- parts ------------------------------------------------------------------------------------


def _over(seeds: Sequence[Seed], arm: str, number: Callable[[Run], float]) -> Interval:
    return interval([number(seed[arm]) for seed in seeds])


def _part(
    seeds: Sequence[Seed],
    out: Path,
    name: str,
    title: str,
    arms: Sequence[str],
    panels: dict[str, str],
) -> str:
    arms = [arm for arm in arms if arm in seeds[0]]
    if not arms:
        return ""
    groups = [SeedGroup(TITLES[arm], [seed[arm] for seed in seeds]) for arm in arms]
    save_figure(groups_figure(groups, panels), out / f"{name}.png")
    rows = []
    for arm in arms:
        cells: list[object] = [
            _over(seeds, arm, mean_entropy),
            _over(seeds, arm, entropy_change),
            *(
                _over(seeds, arm, lambda run, m=metric: 100 * run.series(m).mean())
                for metric in ("clip_fraction_low", "clip_fraction_high")
            ),
        ]
        if "static" in arms:
            pairs = [(seed[arm], seed["static"]) for seed in seeds]
            less = interval([mean_entropy(run) - mean_entropy(static) for run, static in pairs])
            cells.append("" if arm == "static" else less)
        rows.append((TITLES[arm], *cells))
    headings = ["", "entropy, mean", "entropy, end - start", "clipped below, %", "clipped above, %"]
    if "static" in arms:
        headings.append("entropy, mean - static's")
    return f"## {title}\n\n![{title}]({name}.png)\n\n" + _table(headings, rows)


def _outcomes(seeds: Sequence[Seed], out: Path) -> str:
    """(e): held-out figures of every arm, and their differences from static."""
    evaluated = [arm for arm in seeds[0] if len(seeds[0][arm].series("eval_reward"))]
    if not evaluated:
        return ""
    samples = seeds[0][evaluated[0]].config["eval.samples"]
    ks = powers_of_two(samples)
    names = ["eval_reward", "eval_distinct_right", *(f"eval_pass_at_{k}" for k in ks)]
    shown = ["held-out reward", "distinct right", *(f"pass@{k}" for k in ks)]
    rows = [
        (TITLES[arm], *(_over(seeds, arm, lambda run, n=n: at_end(run, n)) for n in names))
        for arm in evaluated
    ]
    text = "## (e) What the policies can do afterwards\n\n![pass@k](e_pass_at_k.png)\n\n"
    text += _table(["", *shown], rows)
    if "static" in evaluated:
        differences = [
            (
                f"{TITLES[arm]} - static",
                *(
                    interval([at_end(s[arm], n) - at_end(s["static"], n) for s in seeds])
                    for n in names
                ),
            )
            for arm in evaluated
            if arm != "static"
        ]
        text += "\n\n" + _table(["", *shown], differences)
    _pass_at_k_picture(seeds, [a for a in evaluated if not a.startswith("id-")], ks, out)
    return text


def _pass_at_k_picture(
    seeds: Sequence[Seed], arms: Sequence[str], ks: Sequence[int], out: Path
) -> None:
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(8, 4), layout="constrained")
        ax = figure.subplots()
        ax.set_title("pass@k on held-out prompts, after the last step")
        ax.set_xscale("log", base=2)
        ax.set_xticks(ks, [str(k) for k in ks])
        ax.set_xlabel("k")
        for number, arm in enumerate(arms):
            found = [
                _over(seeds, arm, lambda run, k=k: at_end(run, f"eval_pass_at_{k}")) for k in ks
            ]
            colour = GROUP_COLOURS[number % len(GROUP_COLOURS)]
            style = "-" if number < len(GROUP_COLOURS) else "--"
            ax.plot(ks, [one.mean for one in found], style, color=colour, label=TITLES[arm])
        figure.legend(loc="outside right upper")
    save_figure(figure, out / "e_pass_at_k.png")


def _predictions(seeds: Sequence[Seed], out: Path) -> str:
    """(f): predicted against measured change of entropy."""
    arms = [arm for arm in seeds[0] if len(seeds[0][arm].series("dh_measured"))]
    if not arms:
        return ""
    with mpl.rc_context(STYLE):
        rows = -(-len(arms) // 3)
        figure = Figure(figsize=(11, 0.6 + 3 * rows), layout="constrained")
        axes = figure.subplots(rows, min(3, len(arms)), squeeze=False).flatten()
        for ax, arm in zip(axes, arms, strict=False):
            scatter_predictions(ax, [seed[arm] for seed in seeds])
            ax.set_title(TITLES[arm], pad=18)
        for ax in axes[len(arms) :]:
            ax.set_axis_off()
    save_figure(figure, out / "f_predictions.png")
    found = [
        (
            TITLES[arm],
            *(_over(seeds, arm, lambda run, n=name: fit(run, n)) for name, _, _ in PREDICTIONS),
        )
        for arm in arms
    ]
    return (
        "## (f) Predicted and measured change of entropy\n\n"
        "Pearson's r over the steps of a run, of the change of mean entropy on a step's own "
        "samples over its updates. *Logit space*: the sum of <dJ/dx, dH/dx> over tokens and "
        "updates, baseline term included; it takes every token's logits for free. *Along the "
        "update*: the exact directional derivative along the change of the weights that was "
        "really made.\n\n"
        "![predictions](f_predictions.png)\n\n"
        + _table(["", "r, logit space", "r, along the update"], found)
    )
