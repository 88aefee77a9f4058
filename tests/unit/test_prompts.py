"""Prompt files and the order in which prompts are handed out."""

from __future__ import annotations

import json

import pytest

from megatron_gpc.errors import UserError
from megatron_gpc.rollout.prompts import PromptSource, read_prompts


def tokenize(text: str) -> list[int]:
    return list(text.encode())


@pytest.fixture
def prompts(tmp_path):
    file = tmp_path / "p.jsonl"
    file.write_text("\n".join(json.dumps({"prompt": f"{n}=", "label": n}) for n in range(10)))
    return read_prompts(file, tokenize)


def test_every_epoch_hands_out_every_prompt_once_in_another_order(prompts):
    source = PromptSource(prompts, seed=1)
    first, second = source.take(10), source.take(10)
    assert {p.index for p in first} == {p.index for p in second} == set(range(10))
    assert first != second


def test_a_restored_cursor_continues_the_same_order(prompts):
    source = PromptSource(prompts, seed=1)
    source.take(7)
    again = PromptSource(prompts, seed=1, cursor=source.cursor)
    assert source.take(8) == again.take(8)


def test_the_seed_decides_the_order(prompts):
    assert PromptSource(prompts, seed=1).take(10) != PromptSource(prompts, seed=2).take(10)


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
