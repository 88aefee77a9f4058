"""The study's arms: what each run changes, and what it is called."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).parent
EXAMPLES = HERE.parent
CONTROL = EXAMPLES / "entropy_control"
ARITHMETIC = EXAMPLES / "arithmetic"


@dataclass(frozen=True)
class Part:
    """Runs of one configuration."""

    config: Path
    common: tuple[str, ...]
    """Overrides of all its runs."""
    arms: Mapping[str, tuple[str, ...]]
    """Name -> its own overrides."""


REGIONS = ("e1", "e2", "e3", "e4")
THRESHOLDS = ("static", "clip-higher", "hi", "lo")
SCHEDULES = ("static", "id", "did", "od")
NOISE = (0, 0.9, 1)
"""Shares of the sums' answers that get a coin for a reward."""
COINS = {"static": "static 0.2", "hi": "Hi(p)", "lo": "Lo(p)", "none": "no clip"}


@dataclass(frozen=True)
class CoinSetting:
    """How far a step's updates go."""

    name: str
    lr: float
    epochs: int

    @property
    def text(self) -> str:
        return str(4 * self.epochs)


COIN_SETTINGS = (
    CoinSetting("coin", 5e-4, 4),
    CoinSetting("coin-fast", 1e-3, 4),
    CoinSetting("coin-few", 5e-4, 2),
)
SINGLE_PROCESS = ("parallel.tp=1", "parallel.pp=1", "plots=false", "checkpoint.every=0")
MEASURED = "diagnostics.entropy_change=true"
STATIC = "clip.schedule=static"
NO_CLIP = (STATIC, "clip.eps_high=1e6", "clip.eps_low=0.999999")
START = ARITHMETIC / "start-peaked"


def sums_arm(share: float, arm: str) -> str:
    return f"sums-{share:g}-{arm}"


def coin_arm(setting: CoinSetting, arm: str) -> str:
    return f"{setting.name}-{arm}"


PARTS: Mapping[str, Part] = {
    "main": Part(
        CONTROL / "config.yaml",
        SINGLE_PROCESS,
        {
            "static": (STATIC, MEASURED),
            "id": ("clip.schedule=id", MEASURED),
            "hi": ("clip.schedule=hi",),
            "lo": ("clip.schedule=lo",),
            "did": ("clip.schedule=did",),
            "od": ("clip.schedule=od",),
            "clip-higher": (STATIC, "clip.eps_high=0.28"),
            # A sign shows early, and a policy that learns from one region does not live long.
            **{
                region: (STATIC, f"clip.regions={region}", MEASURED, "train.steps=10")
                for region in REGIONS
            },
        },
    ),
    "coin": Part(
        CONTROL / "config.yaml",
        (
            *SINGLE_PROCESS,
            f"data.verifier={HERE / 'noisy.py'}:coin",
            *("train.steps=12", "eval.prompts=null"),
        ),
        {
            coin_arm(setting, arm): (
                *(NO_CLIP if arm == "none" else (f"clip.schedule={arm}",)),
                f"optim.lr={setting.lr}",
                f"train.epochs={setting.epochs}",
            )
            for setting in COIN_SETTINGS
            for arm in COINS
        },
    ),
    "noise": Part(
        ARITHMETIC / "config.yaml",
        (
            *SINGLE_PROCESS,
            f"model.hf={START}",
            f"model.build={ARITHMETIC / 'build_peaked.py'}",
            f"data.prompts={START}/train.jsonl",
            f"data.verifier={HERE / 'noisy.py'}:sum_or_coin",
            # Three times the example's learning rate: at that ratios seldom reach the bounds.
            *("eval.prompts=null", "train.steps=24", "optim.lr=3e-4"),
        ),
        {
            sums_arm(share, arm): (
                f"clip.schedule={arm}",
                f"data.verifier_arguments.share={share}",
                *(("diagnostics.signal=4", MEASURED) if arm == "static" else ()),
            )
            for share in NOISE
            for arm in ("static", "hi", "lo", "id")
        },
    ),
}
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
    **{
        sums_arm(share, arm): f"{arm}, {100 * share:g} % coins"
        for share in NOISE
        for arm in ("static", "hi", "lo", "id")
    },
    **{
        coin_arm(setting, arm): f"{title}, {setting.text} updates, {setting.lr:g}"
        for setting in COIN_SETTINGS
        for arm, title in COINS.items()
    },
}
