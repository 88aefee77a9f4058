"""Saved samples come back as they were, or are refused by name."""

from __future__ import annotations

import pytest
import torch

from megatron_gpc.errors import UserError
from megatron_gpc.rollout.samples import read_samples, samples_file, saved_steps, write_samples
from megatron_gpc.types import Prompt, Sample

PROMPT = Prompt(7, "500=", (53, 48, 48, 61), {"target": 500, "terms": [1, None]})
# log-probs as training takes them: fp32
LOGPROBS = tuple(torch.tensor([-0.1, -1 / 3, -20.0]).tolist())
SAMPLES = [
    Sample(PROMPT, 0, (49, 43, 36), LOGPROBS, "1+$ é", "stop", (("3", 0, 3),), 1.0),
    Sample(PROMPT, 1, (49,), (-0.5,), "1", "length", (("3", 0, 0), ("4", 0, 1)), 1 / 3),
]


def test_samples_and_advantages_come_back_to_the_last_bit(tmp_path):
    advantages = torch.tensor([1 / 7, -1 / 7]).tolist()
    file = write_samples(tmp_path, 12, SAMPLES, advantages)
    assert file == samples_file(tmp_path, 12) and [file] == list(file.parent.iterdir())
    assert read_samples(tmp_path, 12) == (SAMPLES, advantages)
    assert saved_steps(tmp_path) == [12]


def test_a_step_that_was_not_saved_is_refused_with_those_that_were(tmp_path):
    with pytest.raises(UserError, match="rollout.save_samples=true"):
        read_samples(tmp_path, 1)
    for step in (1, 2, 5):
        write_samples(tmp_path, step, SAMPLES, [0.0, 0.0])
    with pytest.raises(UserError, match="no samples of step 4; there are 3, from step 1 to 5"):
        read_samples(tmp_path, 4)


@pytest.mark.parametrize("damage", [lambda content: b"", lambda content: content[:-40]])
def test_a_damaged_file_is_named(tmp_path, damage):
    file = write_samples(tmp_path, 1, SAMPLES, [0.0, 0.0])
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(UserError, match="step_000001.parquet: cannot be read"):
        read_samples(tmp_path, 1)
