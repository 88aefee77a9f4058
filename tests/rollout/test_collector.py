"""The collector against the embedded server: groups, seeds, weight versions, judgement."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from safetensors.torch import load_file
from tiny import run_config

from megatron_gpc.rollout.collector import Collector, distinct_right, sample_seed
from megatron_gpc.rollout.launcher import EmbeddedServer
from megatron_gpc.types import Prompt, Sample

PROMPTS = [Prompt(i, "", (5 + i, 7, 9), label=i) for i in range(3)]


@pytest.fixture(scope="module")
def url(model_a, tmp_path_factory) -> Iterator[str]:
    with EmbeddedServer(model_a, tmp_path_factory.mktemp("collector") / "log") as server:
        yield server.url


@pytest.fixture
def collector(url, model_a, tmp_path) -> Iterator[Collector]:
    config = run_config(tmp_path, model_a, "seed=3")
    made = Collector(
        config,
        url,
        verifier=lambda text, label: float(text.startswith(str(label))),
        decode=lambda ids: " ".join(map(str, ids)),
        stop_token_ids=[1],
    )
    yield made
    made.close()


def test_groups_come_prompt_by_prompt_and_judged_on_our_own_decoding(collector):
    samples = collector.sample(PROMPTS, 4, "step 1")
    assert [(s.prompt.index, s.sample_index) for s in samples] == [
        (p, i) for p in range(3) for i in range(4)
    ]
    for sample in samples:
        assert sample.text == " ".join(map(str, sample.token_ids))
        assert sample.reward == float(sample.text.startswith(str(sample.prompt.label)))
        assert 1 <= len(sample.token_ids) == len(sample.logprobs) <= 8


def test_a_sample_depends_on_seed_step_prompt_and_index_alone(collector):
    def tokens(samples):
        return {(s.prompt.index, s.sample_index): s.token_ids for s in samples}

    alone = tokens(collector.sample(PROMPTS[1:2], 2, "step 1"))
    together = tokens(collector.sample(PROMPTS, 4, "step 1"))
    assert alone.items() <= together.items(), "whatever else is sampled at the same time"
    assert together == tokens(collector.sample(PROMPTS, 4, "step 1"))
    assert together != tokens(collector.sample(PROMPTS, 4, "step 2"))


def test_seeds_differ_wherever_anything_differs():
    seeds = {
        sample_seed(run, stream, prompt, index)
        for run in range(3)
        for stream in ("step 1", "step 2", "eval")
        for prompt in range(20)
        for index in range(20)
    }
    assert len(seeds) > 3 * 3 * 400 - 5, "collisions beyond chance"
    assert all(0 <= seed < 2**31 for seed in seeds)


def versions(samples: list[Sample]) -> set[str]:
    return {version for s in samples for version, _, _ in s.weight_versions}


@pytest.mark.parametrize("way", ["disk", "tensor"])
def test_samples_say_which_weights_made_them(collector, model_b, way):
    tensors = load_file(model_b / "model.safetensors") if way == "tensor" else None
    version = {"disk": 11, "tensor": 12}[way]
    collector.hand_over(model_b, tensors, version)
    samples = collector.sample(PROMPTS, 2, "step 1")
    assert versions(samples) == {str(version)}


def test_a_folder_without_weights_is_refused_and_the_old_weights_stay(collector, tmp_path):
    before = collector.sample(PROMPTS, 2, "step 5")
    with pytest.raises(RuntimeError, match="update_weights_from_disk"):
        collector.hand_over(tmp_path, None, 99)
    after = collector.sample(PROMPTS, 2, "step 5")
    assert [s.token_ids for s in before] == [s.token_ids for s in after]
    assert versions(after) == versions(before)


def test_distinct_right_counts_different_right_answers_a_prompt():
    def sample(text: str, reward: float) -> Sample:
        return Sample(PROMPTS[0], 0, (2,), (-1.0,), text, "stop", (("0", 0, 1),), reward)

    samples = [sample("a", 1.0), sample("a", 1.0), sample("b", 1.0), sample("c", 0.0)]
    samples += [sample("d", 0.0)] * 4
    assert distinct_right(samples, 4) == 1.0  # {a, b} and none
    assert torch.tensor([s.reward for s in samples]).mean() == 3 / 8
