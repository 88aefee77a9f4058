"""Whether two runs have written the same: metrics, evaluations, prompts, checkpoints."""

from __future__ import annotations

import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch

from megatron_gpc.mcore.checkpoint.folder import checkpoints
from megatron_gpc.rollout.samples import read_samples, saved_steps

MAY_DIFFER = {".metadata", "SHA256SUMS"}
"""Of a checkpoint: the one names the run's folder and a random number, the other its checksum."""

ROUNDING = 1e-5


def differences(one: Path, other: Path, prompts: int, rounded: Collection[str] = ()) -> list[str]:
    """What two finished runs do not have in common, besides timings and the count of faults.

    Args:
        prompts: how many each of them must have trained on.
        rounded: metrics that may differ by 1e-5.
    """
    found = []
    for name in ("metrics.jsonl", "eval.jsonl"):
        lines, others = untimed(one / name), untimed(other / name)
        if len(lines) != len(others):
            found.append(f"{name}: {len(lines)} lines, {len(others)} lines")
        for a, b in zip(lines, others, strict=False):
            unequal = sorted(
                key
                for key in a.keys() | b.keys()
                if a.get(key) != b.get(key)
                and not (key in rounded and abs(a[key] - b[key]) < ROUNDING)
            )
            found += [f"{name}, step {a['step']}: {key}" for key in unequal]
    for run in (one, other):
        state = torch.load(checkpoints(run)[-1] / "common.pt", weights_only=False)["train_state"]
        source = state["sampling"]["source"]
        trained = [p for step in saved_steps(run) for p in read_samples(run, step).positions]
        if source != {"cursor": prompts, "returned": []} or sorted(trained) != [*range(prompts)]:
            found.append(f"{run.name}: prompts lost or taken twice: {source}, {sorted(trained)}")
    kept = [
        [folder.name for folder in sorted((run / "checkpoints").iterdir())] for run in (one, other)
    ]
    if kept[0] != kept[1]:
        found.append(f"checkpoints: {kept[0]}, {kept[1]}")
    return found + unequal_files(checkpoints(one)[-1], checkpoints(other)[-1])


def untimed(file: Path) -> list[dict[str, Any]]:
    return [
        {
            key: value
            for key, value in json.loads(line).items()
            if not key.startswith(("seconds_", "faults_")) and key != "tokens_per_second"
        }
        for line in file.read_text().splitlines()
    ]


def unequal_files(one: Path, other: Path) -> list[str]:
    """Names of files that only one of two folders has, or that differ in a byte."""
    names = {file.name for folder in (one, other) for file in folder.iterdir()} - MAY_DIFFER
    return [
        f"{one.name}: {name}"
        for name in sorted(names)
        if not ((one / name).is_file() and (other / name).is_file())
        or (one / name).read_bytes() != (other / name).read_bytes()
    ]
