"""tools/convert_prompts.py: published columns -> prompts, through a chat template or as text."""

from __future__ import annotations

import json
import math
import os
from datetime import UTC, date, datetime, time, timedelta
from decimal import Decimal
from pathlib import Path
from uuid import UUID

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

    def tokenize(texts: list[str]) -> list[list[int]]:
        return tokenizer(texts)["input_ids"]

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


KEPT = [  # a value in Parquet, and what stands in the JSON line for it
    (Decimal("4"), "4"),
    (Decimal("12.50"), "12.5"),
    (Decimal(2**70), str(2**70)),
    (date(2024, 2, 29), '"2024-02-29"'),
    (time(12, 30), '"12:30:00"'),
    (datetime(2024, 1, 1, 12, tzinfo=UTC), '"2024-01-01T12:00:00+00:00"'),
    (UUID(int=7), '"00000000-0000-0000-0000-000000000007"'),
    (pyarrow.array([1.5], pyarrow.float16()), "1.5"),
    (pyarrow.array([2**64 - 1], pyarrow.uint64()), str(2**64 - 1)),
    (pyarrow.array(["a"]).dictionary_encode(), '"a"'),
    (pyarrow.array([[("k", 1)]], pyarrow.map_(pyarrow.string(), pyarrow.int64())), '{"k": 1}'),
    ({"a": [{"b": Decimal("0.5")}, None]}, '{"a": [{"b": 0.5}, null]}'),
    (True, "true"),
    ([], "[]"),
]


def parquet_of(file: Path, **columns: object) -> Path:
    """One row; a column is a value, or pyarrow's array of one."""
    arrays = [v if isinstance(v, pyarrow.Array) else pyarrow.array([v]) for v in columns.values()]
    pyarrow.parquet.write_table(pyarrow.table(arrays, names=list(columns)), file)
    return file


@pytest.mark.parametrize(("value", "written"), KEPT, ids=[text for _, text in KEPT])
@pytest.mark.parametrize("name", ["label", "extra"])
def test_values_that_json_can_say_exactly_are_kept(tmp_path: Path, name, value, written) -> None:
    columns = {"prompt": "q", "label": "l", "extra": 0} | {name: value}
    file, out = parquet_of(tmp_path / "p.data", **columns), tmp_path / "p.jsonl"
    assert call("convert_prompts", "--data", file, "--out", out, "--label", "label") == 0
    assert f'"{name}": {written}' in out.read_text()


REFUSED = [
    b"4",
    math.nan,
    math.inf,
    -math.inf,
    Decimal("3.14159265358979323846"),
    timedelta(days=1),
    {"a": [{"b": math.nan}]},
    pyarrow.array([1], pyarrow.timestamp("ns")),
    pyarrow.array([[(1, 1)]], pyarrow.map_(pyarrow.int64(), pyarrow.int64())),
    pyarrow.array([b"\xff"]).view(pyarrow.string()),
]


@pytest.mark.parametrize("value", REFUSED, ids=lambda value: type(value).__name__)
@pytest.mark.parametrize("name", ["label", "extra"])
def test_values_that_json_cannot_say_are_refused_by_row_and_column(
    tmp_path: Path, capsys, name, value
) -> None:
    columns = {"prompt": "q", "label": "l", "extra": 0} | {name: value}
    file, out = parquet_of(tmp_path / "p.parquet", **columns), tmp_path / "p.jsonl"
    command = ("convert_prompts", "--data", file, "--out", out, "--label", "label")
    assert call(*command) == 2 and not out.exists()
    said = capsys.readouterr().err
    assert "row" in said and f"column '{name}'" in said and said.count("\n") == 1
    if name == "extra":
        assert call(*command, "--drop", "extra") == 0
        assert json.loads(out.read_text()) == {
            "prompt": [{"role": "user", "content": "q"}],
            "label": "l",
        }


def test_the_other_columns_of_published_rows_are_kept(parquet: Path, tmp_path: Path) -> None:
    out = tmp_path / "p.jsonl"
    assert call("convert_prompts", "--data", parquet, "--out", out) == 0
    assert json.loads(out.read_text().split("\n")[0]) == {**ROW, "label": "4"}


@pytest.mark.parametrize(
    ("what", "code", "labels"),
    [("refuse", 2, None), ("drop", 0, ["7"]), ("keep", 0, ["4", "7", "5"])],
)
def test_a_question_with_two_labels_is_never_kept_without_a_word(
    tmp_path: Path, capsys, what: str, code: int, labels: list[str] | None
) -> None:
    file, out = tmp_path / "p.jsonl", tmp_path / "out.jsonl"
    rows = [("a", "4"), ("b", "7"), ("a", "5"), ("a", "4")]
    file.write_text("".join(json.dumps({"prompt": p, "label": x}) + "\n" for p, x in rows))
    command = ("convert_prompts", "--data", file, "--out", out, "--label", "label")
    assert call(*command, "--conflicts", what) == code
    said = "".join(capsys.readouterr())
    assert '1 question has several labels: rows 1 ("4") and 3 ("5")' in said
    written = out.read_text().splitlines() if out.exists() else None
    assert (written and [json.loads(line)["label"] for line in written]) == labels


def test_many_questions_with_several_labels_are_counted_and_the_first_are_named(
    tmp_path: Path, capsys
) -> None:
    file = tmp_path / "p.jsonl"
    rows = [{"prompt": f"{i // 2}", "label": i} for i in range(100)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = ("convert_prompts", "--data", file, "--out", tmp_path / "o", "--label", "label")
    assert call(*command) == 2
    said = capsys.readouterr().err
    assert (
        "50 questions have several labels: rows 1 (0) and 2 (1), 3 (2)" in said and ", ..." in said
    )
    assert call(*command, "--conflicts", "drop") == 2, "nothing would be left"


def test_a_byte_order_mark_is_no_part_of_the_text(tmp_path: Path) -> None:
    file, out = tmp_path / "p.jsonl", tmp_path / "out.jsonl"
    line = '{"prompt": "\u00e9", "label": 1}\r\n'
    file.write_bytes(f"\ufeff{line}".encode())
    prompts = read_prompts(file, lambda texts: [[*text.encode()] for text in texts])
    assert [p.text for p in prompts] == ["\u00e9"]
    command = ("convert_prompts", "--data", file, "--out", out, "--label", "label", "--text")
    assert call(*command) == 0
    assert json.loads(out.read_text()) == {"prompt": "\u00e9", "label": 1}


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ('{"prompt": "a", "label": NaN}', "row 1: column 'label': nan (float)"),
        ('{"prompt": "a", "label": 1e999}', "row 1: column 'label': inf (float)"),
        ('{"prompt": "a", "label": null}', "row 1: 'label' is null"),
        ('{"prompt": "a", "label": 1, "label": 2}', "row 1: there are two columns 'label'"),
        ('{"prompt": "a", "label": "\\ud800"}', "row 1: column 'label'"),
        ('{"prompt": "\\ud800", "label": "a"}', "row 1: column 'prompt'"),
        ('{"prompt": "a", "label": "a", "\\udfff": 1}', "row 1: a column's name"),
        ('{"prompt": " \\n", "label": 1}', "row 1: the prompt is empty"),
        ('{"prompt": [{"role": "user", "content": ""}], "label": 1}', "row 1: the prompt is empty"),
        ('{"prompt": [], "label": 1}', "row 1: the prompt is neither"),
        ('{"prompt": {"a": 1}, "label": 1}', "row 1: the prompt is neither"),
        ('{"prompt": "a", "label": ' + "[" * 600 + "]" * 600 + "}", "row 1"),
        ('{"prompt": "a", "label": ' + "[" * 60000 + "]" * 60000 + "}", "row 1"),
        ('{"prompt": "a", "label": ' + "1" * 9999 + "}", "row 1"),
        ('[{"prompt": "a", "label": 1}]', "row 1: no 'prompt'"),
        ("null", "row 1: no 'prompt'"),
    ],
)
def test_rows_that_cannot_be_used_are_named(tmp_path: Path, capsys, line: str, says: str) -> None:
    file, out = tmp_path / "p.jsonl", tmp_path / "out.jsonl"
    file.write_text(line)
    assert call("convert_prompts", "--data", file, "--out", out, "--label", "label") == 2
    said = capsys.readouterr().err
    assert says in said and said.count("\n") == 1 and not out.exists()


def test_columns_of_the_same_name_are_refused(tmp_path: Path, capsys) -> None:
    file = tmp_path / "p.parquet"
    columns = [pyarrow.array(["a"])] * 3
    pyarrow.parquet.write_table(pyarrow.table(columns, names=["prompt", "label", "label"]), file)
    command = ("convert_prompts", "--data", file, "--out", tmp_path / "o", "--label", "label")
    assert call(*command) == 2
    assert "two columns 'label'" in capsys.readouterr().err


def test_a_column_that_would_take_the_prompts_place_is_refused(tmp_path: Path, capsys) -> None:
    file = parquet_of(tmp_path / "p.parquet", problem="1+1?", answer=2, prompt="other")
    columns = ("--prompt", "problem", "--label", "answer")
    command = ("convert_prompts", "--data", file, "--out", tmp_path / "o", *columns)
    assert call(*command) == 2
    assert "--drop prompt" in capsys.readouterr().err
    assert call(*command, "--drop", "prompt") == 0


def test_a_float32_label_is_the_decimal_that_was_meant(tmp_path: Path) -> None:
    columns = {"prompt": ["a"], "label": pyarrow.array([0.1], pyarrow.float32())}
    pyarrow.parquet.write_table(pyarrow.table(columns), tmp_path / "p.parquet")
    out = tmp_path / "p.jsonl"
    asked = ("--data", tmp_path / "p.parquet", "--label", "label")
    assert call("convert_prompts", *asked, "--out", out) == 0
    assert json.loads(out.read_text())["label"] == 0.1


def test_what_is_no_regular_file_is_not_replaced_by_one(parquet: Path, tmp_path, capsys) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    assert call("convert_prompts", "--data", parquet, "--out", pipe) == 2
    assert "no regular file" in capsys.readouterr().err and pipe.is_fifo()
