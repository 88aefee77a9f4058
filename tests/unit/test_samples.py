"""Saved samples come back as they were, or are refused by name."""

from __future__ import annotations

import dataclasses

import pyarrow.parquet as pq
import pytest
import torch

from megatron_gpc.config import RolloutConfig
from megatron_gpc.errors import UserError
from megatron_gpc.rollout.samples import (
    SavedStep,
    check_groups,
    check_routes,
    read_samples,
    samples_file,
    saved_steps,
    write_samples,
)
from megatron_gpc.types import Experts, Prompt, Sample

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


def test_a_file_of_an_older_version_has_no_routes(tmp_path):
    file = write_samples(tmp_path, 1, SAVED)
    pq.write_table(pq.read_table(file).drop_columns(["routes", "right"]), file)
    assert [(s.routes, s.right) for s in read_samples(tmp_path, 1).samples] == [(b"", False)] * 2


MIXTURE = Experts(count=4, topk=2, layers=(0, 2), model_layers=3)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda routes: b"", "does not say which experts its tokens went to"),
        (lambda routes: routes[:-2], "of another model"),
        (lambda routes: routes * 2, "of another model"),
        (lambda routes: routes[:-2] + b"\4\0", "numbered from 0 to 3"),
        (lambda routes: routes[:-2] + b"\1\0", "an expert comes twice"),
    ],
)
def test_routes_come_back_and_are_held_to_what_they_can_be(tmp_path, change, says):
    def routed(sample: Sample) -> Sample:
        tokens = len(sample.prompt.token_ids) + len(sample.token_ids)
        return dataclasses.replace(sample, routes=b"\0\0\3\0\1\0\0\0" * (tokens - 1))

    first, second = map(routed, SAMPLES)
    write_samples(tmp_path, 1, SavedStep([first, second], [31], [0.0, 0.0]))
    saved = read_samples(tmp_path, 1)
    assert saved.samples == [first, second]
    check_routes(saved, MIXTURE, tmp_path)
    changed = dataclasses.replace(second, routes=change(second.routes))
    bad = SavedStep([first, changed], [31], [0.0, 0.0])
    check_routes(bad, None, tmp_path)  # nobody needs them
    with pytest.raises(UserError, match=f"sample 1: .*{says}.*train.routing_replay=true"):
        check_routes(bad, MIXTURE, tmp_path)


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
