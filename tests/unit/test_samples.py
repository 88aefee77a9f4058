"""Saved samples come back as they were, or are refused by name."""

from __future__ import annotations

import pytest
import torch

from megatron_gpc.config import RolloutConfig
from megatron_gpc.errors import UserError
from megatron_gpc.rollout.samples import (
    SavedStep,
    check_groups,
    read_samples,
    samples_file,
    saved_steps,
    write_samples,
)
from megatron_gpc.types import Prompt, Sample

PROMPT = Prompt(7, "500=", (53, 48, 48, 61), {"target": 500, "terms": [1, None]})
# log-probs as training takes them: fp32
LOGPROBS = tuple(torch.tensor([-0.1, -1 / 3, -20.0]).tolist())
SAMPLES = [
    Sample(PROMPT, 0, (49, 43, 36), LOGPROBS, "1+$ é", "stop", (("3", 0, 3),), 1.0, True, {"n": 2}),
    Sample(PROMPT, 1, (49,), (-0.5,), "1", "length", (("3", 0, 0), ("4", 0, 1)), 1 / 3),
]
SAVED = SavedStep(SAMPLES, [31], [0.0, 0.0])


def test_samples_and_advantages_come_back_to_the_last_bit(tmp_path):
    saved = SavedStep(SAMPLES, [31], torch.tensor([1 / 7, -1 / 7]).tolist())
    file = write_samples(tmp_path, 12, saved)
    assert file == samples_file(tmp_path, 12) and [file] == list(file.parent.iterdir())
    assert read_samples(tmp_path, 12) == saved
    assert saved_steps(tmp_path) == [12]


def test_a_step_that_was_not_saved_is_refused_with_those_that_were(tmp_path):
    with pytest.raises(UserError, match="rollout.save_samples=true"):
        read_samples(tmp_path, 1)
    for step in (1, 2, 5):
        write_samples(tmp_path, step, SAVED)
    with pytest.raises(UserError, match="no samples of step 4; there are 3, from step 1 to 5"):
        read_samples(tmp_path, 4)


@pytest.mark.parametrize("damage", [lambda content: b"", lambda content: content[:-40]])
def test_a_damaged_file_is_named(tmp_path, damage):
    file = write_samples(tmp_path, 1, SAVED)
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(UserError, match="step_000001.parquet: cannot be read"):
        read_samples(tmp_path, 1)


def test_groups_of_another_run_are_refused():
    check_groups(SAVED, RolloutConfig(prompts_per_step=1, group_size=2))
    with pytest.raises(UserError, match="prompts_per_step=1 and group_size=2; set both so"):
        check_groups(SAVED, RolloutConfig(prompts_per_step=2, group_size=2))
