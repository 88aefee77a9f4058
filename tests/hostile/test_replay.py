"""Samples to be replayed that cannot be (see test_inputs.py)."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hostile.outcomes import DEEP, refused
from unit.test_preflight import job, start  # noqa: F401 - fixtures

from megatron_gpc.rollout.samples import SavedStep, samples_file, write_samples
from megatron_gpc.types import Prompt, Sample


def saved(folder: Path, **changed: object) -> Path:
    """A step that could be replayed, with columns changed."""
    prompts = [Prompt(n, "1+1=", (49, 43), 2) for n in range(4)]
    versions = (("0", 0, 2),)
    samples = [
        Sample(prompt, k, (49, 36), (-0.5, -1.0), "1$", "stop", versions, float(k))
        for prompt in prompts
        for k in range(4)
    ]
    write_samples(folder, 1, SavedStep(samples, [*range(4)], [0.0] * 16))
    file = samples_file(folder, 1)
    table = pq.read_table(file)
    for name, value in changed.items():
        at = table.column_names.index(name)
        table = table.set_column(at, name, pa.array([value] * 16))
    pq.write_table(table, file)
    return file


REPLAY = {
    "NaN log-prob": {"logprobs": [float("nan"), -1.0]},
    "positive log-prob": {"logprobs": [0.5, -1.0]},
    "infinite log-prob": {"logprobs": [-float("inf"), -1.0]},
    "null log-prob": {"logprobs": [None, -1.0]},
    "too few log-probs": {"logprobs": [-1.0]},
    "infinite reward": {"reward": float("inf")},
    "NaN reward": {"reward": float("nan")},
    "reward beyond fp32": {"reward": 1e300},
    "log-prob beyond fp32": {"logprobs": [-1e30, -1.0]},
    "advantage whose square is beyond fp32": {"advantage": 1e20},
    "scores are a list": {"scores": "[1]"},
    "score is text": {"scores": '{"a": "b"}'},
    "no reward": {"reward": None},
    "reward is text": {"reward": "good"},
    "NaN advantage": {"advantage": float("nan")},
    "empty prompt": {"prompt_token_ids": []},
    "null prompt": {"prompt_token_ids": None},
    "empty response": {"token_ids": []},
    "negative token": {"token_ids": [-1, 3]},
    "token beyond the vocabulary": {"token_ids": [256, 3]},
    "token is text": {"token_ids": ["a", "b"]},
    "label no JSON": {"label": "{"},
    "label too deep": {"label": DEEP},
    "scores no JSON": {"scores": "["},
    "finish_reason": {"finish_reason": "tired"},
    "one prompt": {"position": 0},
    "position is text": {"position": "x"},
    "weight_versions": {"weight_versions": [{"version": "0", "start": 1, "end": 2}]},
    "weight version no number": {"weight_versions": [{"version": "x", "start": 0, "end": 2}]},
    "weight version ²": {"weight_versions": [{"version": "²", "start": 0, "end": 2}]},
    "weight_versions null": {"weight_versions": None},
    "negative number": {"sample_index": -1},
}


@pytest.mark.parametrize("name", REPLAY)
def test_replay_is_held_to_what_a_sample_can_be(job, capsys, name):  # noqa: F811
    overrides = [f"rollout.replay={job.folder}", "train.steps=1"]
    saved(job.folder)
    assert job.command("train", "--dry-run", *overrides) == 0, "unchanged it is accepted"
    saved(job.folder, **REPLAY[name])
    refused(capsys, str(job.folder), lambda: job.command("train", "--dry-run", *overrides))


@pytest.mark.parametrize("damage", ["columns", "empty", "cut", "text", "many", "many steps"])
def test_replay_files_that_are_damaged_are_refused(job, capsys, damage):  # noqa: F811
    file, steps = saved(job.folder), 10**9 if damage == "many steps" else 1
    if damage == "columns":
        pq.write_table(pq.read_table(file).drop_columns(["logprobs"]), file)
    elif damage == "empty":
        pq.write_table(pq.read_table(file).slice(0, 0), file)
    elif damage == "cut":
        file.write_bytes(file.read_bytes()[:-50])
    elif damage == "many":
        pq.write_table(pa.table({"right": pa.nulls(10**7, pa.bool_())}), file)
    elif damage == "text":
        file.write_text("PAR1")
    overrides = [f"rollout.replay={job.folder}", f"train.steps={steps}"]
    refused(capsys, str(job.folder), lambda: job.command("train", "--dry-run", *overrides))
