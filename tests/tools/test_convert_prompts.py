"""tools/convert_prompts.py: published columns -> prompts, through a chat template or as text."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from tool_scripts import call

from megatron_gpc.errors import UserError
from megatron_gpc.rollout.prompts import read_prompts
from megatron_gpc.rollout.tokenizer import chat_renderer, load_tokenizer

ROW = {
    "data_source": "math_dapo",
    "prompt": [{"role": "user", "content": "2+2?"}],
    "ability": "MATH",
    "reward_model": {"ground_truth": "4", "style": "rule"},
    "extra_info": {"index": "a"},
}


@pytest.fixture
def parquet(tmp_path: Path) -> Path:
    """Two questions, one of them twice."""
    other = {**ROW, "prompt": [{"role": "user", "content": "3+3?"}]}
    file = tmp_path / "dapo.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([ROW, other, ROW]), file)
    return file


def test_published_rows_become_prompts_under_the_models_template(
    parquet: Path, with_tokenizer: Path, tmp_path: Path
) -> None:
    out = tmp_path / "p.jsonl"
    assert call("convert_prompts", "--data", parquet, "--out", out, "--suffix", " Box it.") == 0
    tokenizer = load_tokenizer(with_tokenizer)

    def tokenize(text: str) -> list[int]:
        return tokenizer(text)["input_ids"]

    with pytest.raises(UserError, match="has no chat template"):
        read_prompts(out, tokenize, chat_renderer(tokenizer, {}))
    tokenizer.chat_template = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}{{ thought }}"
    )
    prompts = read_prompts(out, tokenize, chat_renderer(tokenizer, {"thought": "..."}))
    assert [p.text for p in prompts] == [
        f"<user>{q} Box it.<assistant>..." for q in ("2+2?", "3+3?")
    ]
    assert [p.label for p in prompts] == ["4", "4"]


def test_json_lines_with_other_columns_as_plain_text(tmp_path: Path) -> None:
    file, out = tmp_path / "aime.jsonl", tmp_path / "p.jsonl"
    file.write_text(json.dumps({"problem": "1+1?", "answer": 2}) + "\n")
    columns = ("--prompt", "problem", "--label", "answer", "--text")
    assert call("convert_prompts", "--data", file, "--out", out, *columns) == 0
    assert json.loads(out.read_text()) == {"prompt": "1+1?", "label": 2}


@pytest.mark.parametrize(
    ("text", "says"),
    [("", "no rows in it"), ("{", "cannot be read"), ('{"prompt": "a"}', "row 1: no 'reward_mod")],
)
def test_what_cannot_be_used_is_refused(tmp_path: Path, capsys, text: str, says: str) -> None:
    (tmp_path / "p.jsonl").write_text(text)
    out = tmp_path / "out.jsonl"
    assert call("convert_prompts", "--data", tmp_path / "p.jsonl", "--out", out) == 2
    assert says in capsys.readouterr().err and not out.exists()
