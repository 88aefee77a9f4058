"""Published prompt sets -> the JSON lines that data.prompts and eval.prompts take.

    megatron-gpc convert prompts --data dapo-math-17k.parquet --out dapo-math-17k.jsonl

Reads Parquet, or JSON lines, with the columns of DAPO-Math-17k and AIME as they are published:
`prompt`, text or a list of messages, and `reward_model.ground_truth`.  Other sets say which columns
they have: --prompt problem --label answer.  The other columns are kept as they are.  Rows that ask
and answer the same are kept once (DAPO-Math-17k holds each a hundred times); questions with several
labels are refused, unless --conflicts says what to do with them.  Exit code 2: the input cannot be
used, and nothing was written.
"""

from __future__ import annotations

import argparse
import json
import math
import signal
from collections.abc import Iterator, Sequence
from datetime import date, datetime, time
from decimal import Decimal
from pathlib import Path
from typing import Any
from uuid import UUID

import pyarrow
import pyarrow.parquet

from megatron_gpc.errors import UserError
from megatron_gpc.rollout.prompts import is_messages
from megatron_gpc.run.files import check_new, write_output

ROWS = 4096
"""Read at a time."""
NAMED = 5
"""Questions with several labels that a message names."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--data", type=Path, required=True, help="Parquet or JSON lines")
    parser.add_argument("--out", type=Path, required=True, help="JSON lines to write")
    parser.add_argument("--prompt", default="prompt", help="column (%(default)s)")
    parser.add_argument("--label", default="reward_model.ground_truth", help="column (%(default)s)")
    parser.add_argument(
        "--drop", action="append", default=[], metavar="COLUMN", help="leave this column out"
    )
    parser.add_argument(
        "--conflicts",
        choices=["refuse", "drop", "keep"],
        default="refuse",
        help="questions with several labels: refuse the file (default), drop these questions, or "
        "keep one prompt a label",
    )
    parser.add_argument(
        "--text",
        action="store_true",
        help="write the messages' contents as plain text, for a model without a chat template",
    )
    parser.add_argument(
        "--suffix", default="", help="added to the last message, such as how to give the answer"
    )


def run(arguments: argparse.Namespace) -> int:
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # nothing half written stays
    check_new("--out", arguments.out)
    kept: dict[str, dict[str, tuple[int, str]]] = {}  # question -> label -> (its first row, line)
    number = 0
    for number, row in rows(arguments.data, arguments.drop):
        where = f"{arguments.data}: row {number}"
        try:
            written = converted(row, arguments, where)
            question, label = json.dumps(written["prompt"]), json.dumps(written["label"])
            line = json.dumps(written, allow_nan=False)
        except RecursionError:
            raise UserError(f"{where}: nested too deeply") from None
        kept.setdefault(question, {}).setdefault(label, (number, line))
    if not kept:
        raise UserError(f"{arguments.data}: no rows in it")
    torn = [labels for labels in kept.values() if len(labels) > 1]
    if torn and arguments.conflicts == "refuse":
        raise UserError(
            f"{arguments.data}: {several(torn)}; correct them, or leave these questions out with "
            "--conflicts drop, or keep one prompt a label with --conflicts keep"
        )
    if arguments.conflicts == "drop":
        kept = {question: labels for question, labels in kept.items() if len(labels) == 1}
        if not kept:
            raise UserError(f"{arguments.data}: {several(torn)}; without them nothing is left")
    lines = [
        line for _, line in sorted(found for labels in kept.values() for found in labels.values())
    ]
    write_output(arguments.out, "".join(f"{line}\n" for line in lines))
    print(f"{arguments.out}: {len(lines)} prompts of {number} rows")
    if torn:
        done = "dropped" if arguments.conflicts == "drop" else "kept, one prompt a label"
        print(f"{several(torn)}: {done}")
    return 0


def several(torn: Sequence[dict[str, tuple[int, str]]]) -> str:
    """What to say of questions with several labels: how many, and the rows of the first few."""
    named = [
        " and ".join(f"{row} ({label:.40})" for label, (row, _) in labels.items())
        for labels in torn[:NAMED]
    ]
    more = ", ..." if len(torn) > NAMED else ""
    count = "1 question has" if len(torn) == 1 else f"{len(torn)} questions have"
    return f"{count} several labels: rows {', '.join(named)}{more}"


# ---- reading ----


def rows(file: Path, drop: Sequence[str]) -> Iterator[tuple[int, Any]]:
    """(number counted from 1, row) of a Parquet file, or of one with a JSON object a line.

    Args:
        drop: columns to leave out; their values are not looked at.
    """
    try:
        with file.open("rb") as opened:
            parquet = opened.read(4) == b"PAR1"
        yield from enumerate(parquet_rows(file, drop) if parquet else json_rows(file, drop), 1)
    except (OSError, ValueError, pyarrow.ArrowException) as error:
        raise UserError(f"{file}: cannot be read: {error}") from None


def parquet_rows(file: Path, drop: Sequence[str]) -> Iterator[dict[str, Any]]:
    source = pyarrow.parquet.ParquetFile(file)
    names = source.schema_arrow.names
    refuse_twice(names, f"{file}")
    first = 1
    for batch in source.iter_batches(ROWS):
        columns = {}
        for name, values in zip(names, batch.columns, strict=True):
            if name in drop:
                continue
            if pyarrow.types.is_float32(values.type) or pyarrow.types.is_float16(values.type):
                values = values.cast(pyarrow.string()).cast(pyarrow.float64())  # 0.1 stays 0.1
            try:
                columns[name] = values.to_pylist(maps_as_pydicts="strict")
            except (ValueError, KeyError) as error:
                last = first + batch.num_rows - 1
                raise UserError(
                    f"{file}: column {name!r}, rows {first} to {last}: {error}"
                ) from None
        first += batch.num_rows
        for i in range(batch.num_rows):
            yield {name: values[i] for name, values in columns.items()}


def json_rows(file: Path, drop: Sequence[str]) -> Iterator[Any]:
    number = 0

    def object_of(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        refuse_twice([name for name, _ in pairs], f"{file}: row {number}")
        return dict(pairs)

    with file.open(encoding="utf-8-sig", newline="\n") as lines:
        for line in lines:
            if not line.strip():
                continue
            number += 1
            try:
                row = json.loads(line, object_pairs_hook=object_of)
            except (ValueError, RecursionError) as error:
                raise UserError(f"{file}: row {number}: not JSON: {error}") from None
            if isinstance(row, dict):
                row = {name: value for name, value in row.items() if name not in drop}
            yield row


def refuse_twice(names: Sequence[str], where: str) -> None:
    """
    Raises:
        UserError: a column's name stands twice.
    """
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"{where}: there are two columns {name!r}; rename or remove one")


# ---- converting ----


def converted(row: Any, arguments: argparse.Namespace, where: str) -> dict[str, Any]:
    """A row as it is written: `prompt`, `label`, and its other columns as they are."""
    prompt = column(row, arguments.prompt, where)
    written = {
        "prompt": asked(prompt, arguments.suffix, arguments.text, where),
        "label": column(row, arguments.label, where),
    }
    for name in row:
        if name in (arguments.prompt, arguments.label):
            continue
        if name in written:
            raise UserError(
                f"{where}: the column {name!r} is not the one that is taken for it "
                f"({getattr(arguments, name)!r}); leave it out with --drop {name}"
            )
        written[name] = row[name]
    return {
        as_json(name, f"{where}: a column's name"): as_json(value, f"{where}: column {name!r}")
        for name, value in written.items()
    }


def column(row: Any, name: str, where: str) -> Any:
    """A row's value by name, or by the dotted path of one inside an object."""
    if isinstance(row, dict) and row.get(name) is not None:
        return row[name]
    for part in name.split("."):
        if not isinstance(row, dict) or part not in row:
            raise UserError(f"{where}: no {name!r}; name the columns with --prompt and --label")
        row = row[part]
    if row is None:
        raise UserError(f"{where}: {name!r} is null; correct or remove the row")
    return row


def asked(prompt: Any, suffix: str, as_text: bool, where: str) -> str | list[dict[str, str]]:
    """Text as a single message of the user; messages without what else a row may say of them."""
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    if not is_messages(messages):
        raise UserError(
            f'{where}: the prompt is neither text nor a list of messages with "role" and "content"'
        )
    if not any(m["content"].strip() for m in messages):
        raise UserError(f"{where}: the prompt is empty")
    found = [{"role": m["role"], "content": m["content"]} for m in messages]
    found[-1]["content"] += suffix
    return "\n\n".join(m["content"] for m in found) if as_text else found


def as_json(value: Any, where: str) -> Any:
    """The same value in JSON's types.

    Dates, times and UUIDs become text; a Decimal becomes a number.

    Raises:
        UserError: JSON has nothing that says exactly the same.
    """
    if value is None or isinstance(value, bool | int):
        return value
    if isinstance(value, str) and not any("\ud800" <= c <= "\udfff" for c in value):
        return value
    if isinstance(value, float) and math.isfinite(value):
        return value
    if isinstance(value, Decimal) and value.is_finite():
        number = int(value) if value == value.to_integral_value() else float(value)
        if Decimal(str(number)) == value:
            return number
    if isinstance(value, date | datetime | time):
        return value.isoformat()
    if isinstance(value, UUID):
        return str(value)
    if type(value) is list or type(value) is tuple:
        return [as_json(item, where) for item in value]
    if isinstance(value, dict) and all(isinstance(name, str) for name in value):
        return {
            as_json(name, where): as_json(item, f"{where}, {name!r}")
            for name, item in value.items()
        }
    shown = repr(value)
    raise UserError(
        f"{where}: {shown:.60} ({type(value).__name__}) cannot be written exactly as JSON; make it "
        "text or a number, remove the row, or leave the column out (--drop)"
    )
