"""Prompt files and the order in which prompts are handed out."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from megatron_gpc.errors import UserError
from megatron_gpc.rollout.prompts import PromptSource, read_prompts
from megatron_gpc.types import Prompt


def tokenize(texts: list[str]) -> list[list[int]]:
    return [list(text.encode()) for text in texts]


@pytest.fixture
def prompts(tmp_path):
    file = tmp_path / "p.jsonl"
    file.write_text("\n".join(json.dumps({"prompt": f"{n}=", "label": n}) for n in range(10)))
    return read_prompts(file, tokenize)


def taken(source: PromptSource, count: int) -> list[Prompt]:
    return [source.at(position) for position in source.take(count)]


def test_every_epoch_hands_out_every_prompt_once_in_another_order(prompts):
    source = PromptSource(prompts, seed=1)
    first, second = taken(source, 10), taken(source, 10)
    assert {p.index for p in first} == {p.index for p in second} == set(range(10))
    assert first != second


def test_a_restored_source_continues_the_same_order(prompts):
    source = PromptSource(prompts, seed=1)
    source.give_back(source.take(7)[2:4])
    again = PromptSource(prompts, seed=1)
    again.restore(source.state())
    assert source.state()["returned"] == [2, 3]
    assert taken(source, 8) == taken(again, 8)


def test_what_is_given_back_comes_first_and_nothing_is_lost_or_doubled(prompts):
    source = PromptSource(prompts, seed=1)
    used = []
    for lost in (3, 0, 5, 1):
        positions = source.take(6)
        source.give_back(positions[lost:4])
        used += [p for p in positions if p not in positions[lost:4]]
    used += source.take(source.cursor - len(used))
    assert sorted(used) == list(range(len(used)))


def test_giving_back_what_was_handed_out_last_leaves_no_trace(prompts):
    """So that how much was asked for too early, which is chance, is not part of the state."""
    source = PromptSource(prompts, seed=1)
    source.take(4)
    before = source.state()
    for surplus in (1, 3):
        source.give_back(source.take(surplus))
        assert source.state() == before


def test_the_digest_is_of_token_ids_labels_and_order(prompts):
    def digest(prompts):
        return PromptSource(prompts, seed=1).digest

    one, two, *rest = prompts
    same = replace(one, text="said otherwise")
    assert digest([same, two, *rest]) == digest(prompts)
    for other in (
        [two, one, *rest],
        [one, *rest],
        [replace(one, label="0"), two, *rest],
        [replace(one, token_ids=(*one.token_ids, 5)), two, *rest],
    ):
        assert digest(other) != digest(prompts)


def test_the_seed_decides_the_order(prompts):
    assert taken(PromptSource(prompts, seed=1), 10) != taken(PromptSource(prompts, seed=2), 10)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "no prompts"),
        ('{"prompt": "a", "label": 1}\n{', "p.jsonl:2: not JSON"),
        ('{"prompt": "a"}', 'p.jsonl:1: expected an object with "prompt"'),
        ('{"prompt": "", "label": 1}', "p.jsonl:1: the prompt has no tokens"),
    ],
)
def test_bad_files_are_refused_by_line(tmp_path, text, says):
    file = tmp_path / "p.jsonl"
    file.write_text(text)
    with pytest.raises(UserError) as error:
        read_prompts(file, tokenize)
    assert says in str(error.value)
