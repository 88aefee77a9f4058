"""Samples of a training step as a file: to be looked at, and to be trained on again.

One Parquet file a step, `RUN/samples/step_NNNNNN.parquet`, one row a sample.  Imports no torch.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from megatron_gpc.config import RolloutConfig
from megatron_gpc.config.layout import MOST_STEP_SAMPLES
from megatron_gpc.engines.answers import untrue_routes
from megatron_gpc.errors import UserError
from megatron_gpc.run.files import by_step, name_of_step, replacing, strict_json
from megatron_gpc.types import LARGEST, Experts, Prompt, Sample, is_usable

FOLDER, SUFFIX = "samples", ".parquet"
MOST_LOGPROB = 1e-3
"""Rounding lifts a log-prob above 0 by less [nats]."""
SCHEMA = pa.schema(
    [
        ("position", pa.int64()),  # of the prompt in the run's order, over all epochs
        ("prompt_index", pa.int64()),
        ("sample_index", pa.int32()),
        ("prompt", pa.string()),
        ("prompt_token_ids", pa.list_(pa.int32())),
        ("label", pa.string()),  # JSON
        ("text", pa.string()),
        ("token_ids", pa.list_(pa.int32())),
        ("logprobs", pa.list_(pa.float32())),  # as precise as training takes them
        ("finish_reason", pa.string()),
        (
            "weight_versions",
            pa.list_(
                pa.struct([("version", pa.string()), ("start", pa.int32()), ("end", pa.int32())])
            ),
        ),
        ("reward", pa.float64()),
        ("right", pa.bool_()),  # null in files of older versions
        ("scores", pa.string()),  # JSON
        ("advantage", pa.float32()),
        ("routes", pa.binary()),  # as Sample has them; absent in files of older versions
    ]
)
LATER = {"right": None, "routes": b""}
"""Columns that came with a later version -> what stands for them in older files."""


def samples_file(run_dir: Path, step: int) -> Path:
    return run_dir / FOLDER / (name_of_step(step) + SUFFIX)


@dataclass(frozen=True)
class SavedStep:
    """The samples of a training step, as they were trained on."""

    samples: list[Sample]
    """group_size of every prompt, prompt by prompt."""
    positions: list[int]
    """Of every prompt in the run's order (rollout/prompts.py)."""
    advantages: list[float]
    """Of every sample."""

    @property
    def group_size(self) -> int:
        return len(self.samples) // len(self.positions)


def write_samples(run_dir: Path, step: int, saved: SavedStep) -> Path:
    """Write the samples of a step; a reader sees the whole file or none.

    Raises:
        OSError: the file cannot be written.
    """
    rows = [
        {
            "position": saved.positions[n // saved.group_size],
            "prompt_index": sample.prompt.index,
            "sample_index": sample.sample_index,
            "prompt": sample.prompt.text,
            "prompt_token_ids": sample.prompt.token_ids,
            "label": json.dumps(sample.prompt.label),
            "text": sample.text,
            "token_ids": sample.token_ids,
            "logprobs": sample.logprobs,
            "finish_reason": sample.finish_reason,
            "weight_versions": [
                {"version": version, "start": start, "end": end}
                for version, start, end in sample.weight_versions
            ],
            "reward": sample.reward,
            "right": sample.right,
            "scores": json.dumps(sample.scores),
            "advantage": saved.advantages[n],
            "routes": sample.routes,
        }
        for n, sample in enumerate(saved.samples)
    ]
    file = samples_file(run_dir, step)
    file.parent.mkdir(parents=True, exist_ok=True)
    # Python opens it: an error of pyarrow's own does not name the file.
    with replacing(file) as part, part.open("wb") as stream:
        pq.write_table(pa.Table.from_pylist(rows, SCHEMA), stream, compression="zstd")
    return file


def read_samples(run_dir: Path, step: int) -> SavedStep:
    """The samples of a step, in the order in which they were trained on.

    Raises:
        UserError: there is no such file (names the steps there are), or it is damaged.
    """
    file = samples_file(run_dir, step)
    if not file.is_file():
        raise UserError(f"{file}: no samples of step {step}; {_what_there_is(run_dir)}")
    try:
        source = pq.ParquetFile(file)
        if source.metadata.num_rows > MOST_STEP_SAMPLES:  # a few bytes can stand for billions
            raise ValueError(f"it has {source.metadata.num_rows} rows")
        table = source.read()
        rows = pa.table([_column(table, field) for field in SCHEMA], schema=SCHEMA).to_pylist()
        samples = [_sample(row) for row in rows]
    except (
        OSError,
        pa.ArrowException,
        LookupError,
        TypeError,
        ValueError,
        RecursionError,
    ) as error:
        why = " ".join(str(error).split())
        raise UserError(f"{file}: cannot be read as samples: {why}; save them again") from None
    positions = list(dict.fromkeys(row["position"] for row in rows))
    if not positions or len(rows) % len(positions):
        raise UserError(f"{file}: {len(rows)} samples of {len(positions)} prompts are no groups")
    return SavedStep(samples, positions, [row["advantage"] for row in rows])


def _column(table: pa.Table, field: pa.Field) -> pa.ChunkedArray:
    """A column in the type that we write."""
    if field.name in LATER and field.name not in table.column_names:
        return pa.chunked_array([pa.repeat(pa.scalar(LATER[field.name], field.type), len(table))])
    column = table.column(field.name).cast(field.type)
    if column.null_count and field.name != "right":
        raise ValueError(f"{field.name} is null in a row")
    return column


def check_groups(saved: SavedStep, rollout: RolloutConfig) -> None:
    """Hold replayed samples to the configured groups, and to what a sample can be.

    Raises:
        UserError: they were saved by a run with other groups, or cannot be trained on.
    """
    found = len(saved.positions), saved.group_size
    if found != (rollout.prompts_per_step, rollout.group_size):
        raise UserError(
            f"rollout.replay: {rollout.replay} was made with prompts_per_step={found[0]} and "
            f"group_size={found[1]}; set both so"
        )
    for number, (sample, advantage) in enumerate(zip(saved.samples, saved.advantages, strict=True)):
        why = _untrainable(sample, advantage)
        if why:
            raise UserError(
                f"rollout.replay: {rollout.replay}: sample {number}: {why}; save the samples "
                "again, or name another run"
            )


def check_routes(saved: SavedStep, experts: Experts | None, replay: Path | None) -> None:
    """Hold replayed samples to saying which experts their tokens went to, if that is needed.

    Args:
        experts: of the model, with train.routing_replay.
        replay: rollout.replay, for messages.

    Raises:
        UserError: one does not, or says what cannot be.
    """
    if experts is None:
        return
    for number, sample in enumerate(saved.samples):
        shape = (-1, len(experts.layers), experts.topk)
        tokens = len(sample.prompt.token_ids) + len(sample.token_ids)
        if len(sample.routes) != 2 * (tokens - 1) * len(experts.layers) * experts.topk:
            why = "its routes are of another model"
            if not sample.routes:
                why = "it does not say which experts its tokens went to"
        else:
            routes = np.frombuffer(sample.routes, dtype="<i2").reshape(shape)
            why = untrue_routes(routes, experts)
        if why:
            raise UserError(
                f"train.routing_replay: {replay}: sample {number}: {why}; name a run of this "
                "model that had train.routing_replay=true, or leave it out"
            )


def _untrainable(sample: Sample, advantage: float) -> str:
    """Why there is no such sample; empty if there can be."""
    end = 0
    for version, start, stop in sample.weight_versions:
        if start != end or stop < start:
            return "weight_versions do not follow each other"
        if not re.fullmatch("[0-9]{1,10}", version):
            return f"a weight version is {version!r:.40}, no number"
        end = stop
    tokens = [*sample.prompt.token_ids, *sample.token_ids]
    wrong = {
        "prompt_token_ids is empty": not sample.prompt.token_ids,
        "token_ids is empty": not sample.token_ids,
        "a token is negative or null": not all(t is not None and t >= 0 for t in tokens),
        "token_ids and logprobs differ in length": len(sample.token_ids) != len(sample.logprobs),
        "a log-prob is no finite number up to 0": not all(
            is_usable(p) and p <= MOST_LOGPROB for p in sample.logprobs
        ),
        "weight_versions end elsewhere than token_ids": end != len(sample.token_ids),
        f"reward, advantage or a score is no number up to {LARGEST:g}": not all(
            map(is_usable, (sample.reward, advantage, *sample.scores.values()))
        ),
        f"finish_reason is {sample.finish_reason!r:.40}": sample.finish_reason
        not in ("stop", "length", "abort"),
        "position or number is negative": min(sample.prompt.index, sample.sample_index) < 0,
    }
    return next((why for why, holds in wrong.items() if holds), "")


def _sample(row: dict[str, Any]) -> Sample:
    return Sample(
        prompt=Prompt(
            row["prompt_index"],
            row["prompt"],
            tuple(row["prompt_token_ids"]),
            strict_json(row["label"]),
        ),
        sample_index=row["sample_index"],
        token_ids=tuple(row["token_ids"]),
        logprobs=tuple(row["logprobs"]),
        text=row["text"],
        finish_reason=row["finish_reason"],
        weight_versions=tuple(
            (span["version"], span["start"], span["end"]) for span in row["weight_versions"]
        ),
        reward=row["reward"],
        right=bool(row["right"]),
        scores=dict(strict_json(row["scores"] or "{}")),
        routes=row["routes"],
    )


def saved_steps(run_dir: Path) -> list[int]:
    """Steps whose samples were saved, ascending."""
    return list(by_step(run_dir / FOLDER, SUFFIX))


def _what_there_is(run_dir: Path) -> str:
    steps = saved_steps(run_dir)
    if steps:
        return f"there are {len(steps)}, from step {steps[0]} to {steps[-1]}"
    if not run_dir.is_dir():
        return f"{run_dir} is no folder; give the folder of a run (run_dir)"
    return f"{run_dir} has none; a run saves them with rollout.save_samples=true"
