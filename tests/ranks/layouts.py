"""The layouts that are compared, and how: for the tests, and for `make layouts` as a program.

PYTHONPATH=tests:. python tests/ranks/layouts.py      prints the table of docs/layouts.md
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import ranks
import torch
from pool import Pool, Pools
from problems import BOUNDS, MODELS, Problem, Reference, make_problem
from tiny import run_config

# fp32 keeps 24 bits, so one operation is off by 6e-8 at most; sums over some hundred numbers in
# another order, eight matrices deep, by the tolerances below.  Measured: docs/layouts.md.
LOSS = 2e-6
"""Relative difference of the loss, a mean of terms of both signs, each some times its size."""
METRIC = 2e-6
"""Relative difference of gradient norm, mean and maximum of the ratio."""
TOKEN = 1e-5
"""Largest difference of a log-prob, an entropy or another of TokenStats over tokens, relative to
the largest value."""
GRADIENT = 2e-5
"""Largest difference of a gradient's elements, relative to its largest, over weights."""

LEARNING_RATE = 1e3
# Adam with a huge epsilon is gradient descent: the weights' change is -LEARNING_RATE * gradient to
# fp32 rounding, after everything that megatron-core's optimizers do to gradients.  A change so
# large that the weights' own rounding does not show in it.
EPSILON = 1e6
DESCENT = (f"optim.lr={LEARNING_RATE * EPSILON}", f"optim.eps={EPSILON}", "optim.clip_grad=1e9")

TP2, PP2, DP2, CP2, EP2 = (f"parallel.{name}=2" for name in ("tp", "pp", "dp", "cp", "ep"))
SP, VPP2 = "parallel.sequence_parallel=true", "parallel.vpp=2"
REPLICATED = "optim.distributed=false"
DENSE = ("dense", "tied", "qk-norm")
ALL = tuple(MODELS)


@dataclass(frozen=True)
class Layout:
    world: int
    overrides: tuple[str, ...] = ()
    models: tuple[str, ...] = ALL

    def __str__(self) -> str:
        """`tp 2 + pp 2`."""
        parts = (override.split(".", 1)[1].replace("=true", "") for override in self.overrides)
        return " + ".join(part.replace("=", " ") for part in parts) or "one process"


ONE = Layout(1, ("train.micro_batch_size=1",))
LAYOUTS = [
    ONE,
    Layout(1, ("train.micro_batch_size=12",)),
    Layout(1, ("train.micro_batch_size=5", "train.micro_batch_tokens=60")),
    Layout(2, (TP2,), DENSE),
    Layout(2, (TP2, SP)),
    Layout(2, (PP2,)),
    Layout(2, (PP2, VPP2)),
    Layout(2, (DP2,)),
    Layout(2, (DP2, REPLICATED)),
    Layout(2, (CP2,)),
    Layout(2, (DP2, EP2), ("moe",)),
    Layout(2, (CP2, EP2), ("moe",)),
    Layout(4, ("parallel.tp=4",), DENSE),  # two key-value heads for four ranks
    Layout(4, (TP2, PP2), DENSE),
    Layout(4, (TP2, PP2, VPP2, SP)),
    Layout(4, (TP2, DP2), DENSE),
    Layout(4, ("parallel.dp=4", "train.micro_batch_size=2")),
    Layout(4, ("parallel.cp=4",)),
    Layout(4, (CP2, TP2, SP)),
    Layout(4, (CP2, PP2)),
    Layout(4, (CP2, DP2)),
    Layout(4, (TP2, SP, DP2, EP2), ("moe",)),
    Layout(4, (PP2, DP2, EP2), ("moe",)),
    Layout(4, ("parallel.dp=4", EP2), ("moe",)),
    Layout(4, (CP2, DP2, "parallel.ep=4"), ("moe",)),
]


def two_models_each(layouts: Sequence[Layout]) -> list[Layout]:
    """The same layouts, each with two of its models in turn, or with the only one it has."""
    pairs = []
    for number, layout in enumerate(layouts):
        models, first = layout.models, number % len(layout.models)
        pairs.append(replace(layout, models=(models[first:] + models[:first])[:2]))
    return pairs


@dataclass(frozen=True)
class Differences:
    """Largest relative differences from a reference, over all ranks."""

    loss: float
    metric: float
    token: dict[str, float]
    """By the name of a field of TokenStats."""
    gradient: float

    def within_tolerance(self) -> bool:
        return (
            self.loss < LOSS
            and self.metric < METRIC
            and max(self.token.values()) < TOKEN
            and self.gradient < GRADIENT
        )


def measure(
    pool: Callable[[int], Pool],
    layout: Layout,
    problems: Mapping[str, Problem],
    folder: Path,
    *more: str,
    samples: Sequence[int] | None = None,
    run: Callable[..., Any] = ranks.score_and_update,
) -> list[dict[str, dict[str, Any]]]:
    """What `run` gives on every rank, for the layout's models among `problems`.

    Args:
        folder: for the run's configuration.
        more: further overrides.
        samples: of the mini-batch; everything unless some are named.
    """
    given = {name: (p.hf, p.batch) for name, p in problems.items() if name in layout.models}
    config = run_config(folder, folder, *DESCENT, *layout.overrides, *more)
    named = None if samples is None else list(samples)
    return pool(layout.world).run(run, config, given, BOUNDS, named)


def gradient(result: dict[str, Any]) -> dict[str, torch.Tensor]:
    """float64, from the weights around an update, which rank 0 has."""
    return {
        name: (result["before"][name].double() - after.double()) / LEARNING_RATE
        for name, after in result["after"].items()
    }


def differences(
    results: Sequence[dict[str, Any]], reference: Reference, slots: Sequence[int]
) -> Differences:
    """Of one model, on all ranks.

    Args:
        results: of `measure`, one a rank.
        slots: where the mini-batch's response tokens stand in the rollout's packed arrays.
    """

    def largest(values: Callable[[dict[str, Any]], float], want: float) -> float:
        return max(abs(values(result) - want) for result in results) / abs(want)

    return Differences(
        loss=largest(lambda r: r["loss"], reference.loss),
        metric=max(
            largest(lambda r, name=name: r[name], getattr(reference, name))
            for name in ("grad_norm", "ratio_mean", "ratio_max")
        ),
        token={
            name: max(
                relative(getattr(r["scored"], name)[slots], getattr(reference, name))
                for r in results
            )
            for name in ("logp_T", "entropy_T", "sum_p2_T", "sum_p2_logp_T")
        },
        gradient=largest_relative(gradient(results[0]), reference.gradient),
    )


def hold_to(
    reference: Reference, results: Sequence[dict[str, Any]], slots: Sequence[int], name: str
) -> None:
    """Assert that all ranks found what the reference did, within tolerance, and clipped as it did.

    Arguments as of `differences`; `name` of the model, for messages.
    """
    found = differences(results, reference, slots)
    assert found.within_tolerance(), (name, found)
    assert clip_decisions(results, slots) == reference.clip_decisions, name


def clip_decisions(
    results: Sequence[dict[str, Any]], slots: Sequence[int]
) -> list[tuple[bool, bool]]:
    """(clipped below, clipped above) of every response token of the mini-batch.

    Tensor-parallel ranks hold the same tokens, and must have decided alike.
    """
    clipped: dict[int, tuple[bool, bool]] = {}
    for result in results:
        for slot, flags in result["clipped"].items():
            assert clipped.setdefault(slot, flags) == flags
    assert clipped.keys() == set(slots)
    return [clipped[slot] for slot in slots]


def relative(got: torch.Tensor, want: torch.Tensor) -> float:
    return float((got.double() - want).abs().max() / want.abs().max())


def largest_relative(got: dict[str, torch.Tensor], want: dict[str, torch.Tensor]) -> float:
    assert got.keys() == want.keys()
    return max(relative(got[name], want[name]) for name in want)


def main() -> None:
    """Print differences of loss, gradient and entropy as a table in Markdown."""
    pools = Pools()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        problems = {model: make_problem(model, folder / model) for model in MODELS}
        references = {model: p.reference(folder) for model, p in problems.items()}
        print(f"| layout | {' | '.join(MODELS)} |\n|---|{'---|' * len(MODELS)}")
        for layout in LAYOUTS:
            results = measure(pools, layout, problems, folder)
            cells = []
            for model, reference in references.items():
                if model not in layout.models:
                    cells.append("")
                    continue
                slots = range(len(reference.logp_T))
                found = differences([r[model] for r in results], reference, slots)
                decided = clip_decisions([r[model] for r in results], slots)
                assert decided == reference.clip_decisions and found.within_tolerance(), found
                shown = (found.loss, found.gradient, found.token["entropy_T"])
                cells.append(" ".join(f"{value:.0e}" for value in shown))
            print(f"| {layout} | {' | '.join(cells)} |", flush=True)
    pools.close()


if __name__ == "__main__":
    main()
