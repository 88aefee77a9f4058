"""Published prompt sets -> the JSON lines that data.prompts and eval.prompts take.

    python tools/convert_prompts.py --data dapo-math-17k.parquet --out dapo-math-17k.jsonl

Reads Parquet, or JSON lines, with the columns of DAPO-Math-17k and AIME as they are published:
`prompt`, text or a list of messages, and `reward_model.ground_truth`.  Other sets say which columns
they have: --prompt problem --label answer.  Rows that ask and answer the same are kept once
(DAPO-Math-17k holds each a hundred times).  Exit code 2: the input cannot be used, and nothing was
written.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet

from megatron_gpc.commands.script import run
from megatron_gpc.errors import UserError
from megatron_gpc.rollout.prompts import is_messages
from megatron_gpc.run.files import replace_text

ROWS = 4096
"""Read at a time."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="Parquet or JSON lines")
    parser.add_argument("--out", type=Path, required=True, help="JSON lines to write")
    parser.add_argument("--prompt", default="prompt", help="column (%(default)s)")
    parser.add_argument("--label", default="reward_model.ground_truth", help="column (%(default)s)")
    parser.add_argument(
        "--text",
        action="store_true",
        help="write the messages' contents as plain text, for a model without a chat template",
    )
    parser.add_argument(
        "--suffix", default="", help="added to the last message, such as how to give the answer"
    )
    arguments = parser.parse_args()
    kept: dict[str, None] = {}
    number = 0
    for number, row in enumerate(rows(arguments.data), start=1):
        where = f"{arguments.data}: row {number}"
        given = column(row, arguments.prompt, where)
        prompt = asked(given, arguments.suffix, arguments.text, where)
        label = column(row, arguments.label, where)
        kept[json.dumps({"prompt": prompt, "label": label})] = None
    if not kept:
        raise UserError(f"{arguments.data}: no rows in it")
    try:
        replace_text(arguments.out, "".join(f"{line}\n" for line in kept))
    except OSError as error:
        raise UserError(f"{arguments.out}: cannot be written: {error.strerror}") from None
    print(f"{arguments.out}: {len(kept)} prompts of {number} rows")
    return 0


def rows(file: Path) -> Iterator[dict[str, Any]]:
    """The rows of a Parquet file, or of one with a JSON object a line."""
    try:
        if file.suffix == ".parquet":
            for batch in pyarrow.parquet.ParquetFile(file).iter_batches(ROWS):
                yield from batch.to_pylist()
        else:
            with file.open() as lines:
                yield from (json.loads(line) for line in lines if line.strip())
    except (OSError, ValueError, pyarrow.ArrowException) as error:
        raise UserError(f"{file}: cannot be read: {error}") from None


def column(row: Any, name: str, where: str) -> Any:
    """A row's value by dotted name."""
    for part in name.split("."):
        if not isinstance(row, dict) or row.get(part) is None:
            raise UserError(f"{where}: no {name!r}; name the columns with --prompt and --label")
        row = row[part]
    return row


def asked(prompt: Any, suffix: str, as_text: bool, where: str) -> str | list[dict[str, str]]:
    """Text as a single message of the user; messages without what else a row may say of them."""
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    if not is_messages(messages):
        raise UserError(
            f'{where}: the prompt is neither text nor a list of messages with "role" and "content"'
        )
    found = [{"role": m["role"], "content": m["content"]} for m in messages]
    found[-1]["content"] += suffix
    return "\n\n".join(m["content"] for m in found) if as_text else found


if __name__ == "__main__":
    sys.exit(run(main))
