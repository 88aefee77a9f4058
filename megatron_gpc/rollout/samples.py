"""Samples of a training step as a file: to be looked at, and to be trained on again.

One Parquet file a step, `RUN/samples/step_NNNNNN.parquet`, one row a sample.  Imports no torch.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from megatron_gpc.errors import UserError
from megatron_gpc.types import Prompt, Sample

FOLDER = "samples"
SCHEMA = pa.schema(
    [
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
        ("advantage", pa.float32()),
    ]
)


def samples_file(run_dir: Path, step: int) -> Path:
    return run_dir / FOLDER / f"step_{step:06d}.parquet"


def write_samples(
    run_dir: Path, step: int, samples: Sequence[Sample], advantages: Sequence[float]
) -> Path:
    """Write the samples of a step; a reader sees the whole file or none.

    Raises:
        OSError: the file cannot be written.
    """
    rows = [
        {
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
            "advantage": advantage,
        }
        for sample, advantage in zip(samples, advantages, strict=True)
    ]
    file = samples_file(run_dir, step)
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_suffix(".part")
    pq.write_table(pa.Table.from_pylist(rows, SCHEMA), part, compression="zstd")
    part.replace(file)
    return file


def read_samples(run_dir: Path, step: int) -> tuple[list[Sample], list[float]]:
    """The samples of a step, in the order in which they were trained on, and their advantages.

    Raises:
        UserError: there is no such file (names the steps there are), or it is damaged.
    """
    file = samples_file(run_dir, step)
    if not file.is_file():
        raise UserError(f"{file}: no samples of step {step}; {_what_there_is(run_dir)}")
    try:
        rows = pq.read_table(file, schema=SCHEMA).to_pylist()
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"{file}: cannot be read as samples: {error}") from None
    samples = [
        Sample(
            prompt=Prompt(
                row["prompt_index"],
                row["prompt"],
                tuple(row["prompt_token_ids"]),
                json.loads(row["label"]),
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
        )
        for row in rows
    ]
    return samples, [row["advantage"] for row in rows]


def saved_steps(run_dir: Path) -> list[int]:
    """Steps whose samples were saved, ascending."""
    names = (re.fullmatch(r"step_(\d+)\.parquet", f.name) for f in (run_dir / FOLDER).glob("*"))
    return sorted(int(name[1]) for name in names if name)


def _what_there_is(run_dir: Path) -> str:
    steps = saved_steps(run_dir)
    if steps:
        return f"there are {len(steps)}, from step {steps[0]} to {steps[-1]}"
    return f"{run_dir} has none; a run saves them with rollout.save_samples=true"
