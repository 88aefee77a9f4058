"""Prompts: a JSON-lines file, shuffled anew every epoch, handed out from a cursor."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from random import Random
from typing import Any

from megatron_gpc.config import DataConfig
from megatron_gpc.errors import UserError
from megatron_gpc.run.files import strict_json
from megatron_gpc.types import Prompt

Message = dict[str, str]
"""{role, content}"""


@dataclass(frozen=True)
class Limit:
    """What prompts have to fit into."""

    tokens: int
    """Most tokens of a prompt."""
    reason: str
    """Why there are no more, for messages."""
    vocabulary: int
    """Token ids are below it."""
    drop: bool = False
    """Leave out prompts that are longer, instead of refusing the file."""


def read_prompts(
    file: Path,
    tokenize: Callable[[list[str]], list[list[int]]],
    render: Callable[[list[Message]], str] | None = None,
    limit: Limit | None = None,
    say: Callable[[str], object] = lambda text: None,
) -> list[Prompt]:
    """All prompts of a file that fit.

    Args:
        file: one JSON object a line: `prompt` (text, or a list of messages) and `label` (whatever
            the verifier needs).
        tokenize: texts -> token ids of each.
        render: messages -> text; None: there may be none.
        limit: what they have to fit into; None: anything fits.
        say: is told how many were left out, if any.

    Raises:
        UserError: names file and line of what cannot be used.
    """
    texts: list[str] = []
    rows, numbers = [], []
    for number, line in enumerate(_lines(file), start=1):
        if line.strip():
            text, row = _read_line(f"{file}:{number}", line, render)
            texts.append(text)
            rows.append(row)
            numbers.append(number)
    if not texts:
        raise UserError(f"{file}: no prompts in it")
    prompts: list[Prompt] = []
    too_long: list[tuple[int, int]] = []  # (line, tokens)
    for start in range(0, len(texts), _TOKENIZED_AT_ONCE):
        part = slice(start, start + _TOKENIZED_AT_ONCE)
        ids = tokenize(texts[part])
        for number, text, token_ids, row in zip(
            numbers[part], texts[part], ids, rows[part], strict=True
        ):
            if not token_ids:
                raise UserError(f"{file}:{number}: the prompt has no tokens")
            if limit is not None and len(token_ids) > limit.tokens:
                too_long.append((number, len(token_ids)))
                continue
            if limit is not None and max(token_ids) >= limit.vocabulary:
                raise UserError(
                    f"{file}:{number}: the prompt has token {max(token_ids)}, beyond the model's "
                    f"vocabulary of {limit.vocabulary}; the tokenizer in model.hf is another "
                    "model's, or has had tokens added"
                )
            prompts.append(_prompt(len(prompts), text, token_ids, row, f"{file}:{number}"))
    if too_long and limit is not None:
        _refuse_or_say(file, too_long, len(prompts), limit, say)
    return prompts


MOST_CHARACTERS = 2**22
"""Of a prompt: more than any model's context holds, and tokenizers take seconds for so many."""
_TOKENIZED_AT_ONCE = 1024
"""Prompts; a tokenizer is quicker with many, and an interrupt waits for it."""


def _refuse_or_say(
    file: Path,
    too_long: list[tuple[int, int]],
    kept: int,
    limit: Limit,
    say: Callable[[str], object],
) -> None:
    (number, tokens), count = too_long[0], len(too_long)
    fit = f"{limit.tokens} fit ({limit.reason})"
    if not limit.drop:
        more = f", and {count - 1} more prompts are too long" if count > 1 else ""
        raise UserError(
            f"{file}:{number}: the prompt has {tokens} tokens, and {fit}{more}; shorten it, or "
            "leave out what is too long with data.too_long=drop"
        )
    if not kept:
        raise UserError(
            f"{file}: no prompts are left with data.too_long=drop: line {number} has {tokens} "
            f"tokens, all have more than the {fit}"
        )
    say(
        f"{file}: {count} of {count + kept} prompts are left out (data.too_long=drop): line "
        f"{number} has {tokens} tokens, and {fit}"
    )


def _lines(file: Path) -> list[str]:
    try:
        if file.exists() and not file.is_file():  # a pipe can be read only once
            what = "a folder" if file.is_dir() else "no regular file"
            raise UserError(f"{file} is {what}; name a file of JSON lines")
        content = file.read_bytes()
    except OSError as error:
        raise UserError(f"{file}: cannot read prompts: {error.strerror}") from None
    if content.startswith(b"PAR1"):
        raise UserError(
            f"{file}: is a Parquet file; make JSON lines of it with `megatron-gpc convert prompts`"
        )
    try:
        return content.decode("utf-8-sig").split("\n")  # splitlines() also splits inside strings
    except UnicodeDecodeError as error:
        number = content.count(b"\n", 0, error.start) + 1
        raise UserError(f"{file}:{number}: cannot read prompts: not UTF-8 text: {error}") from None


def _read_line(
    where: str, line: str, render: Callable[[list[Message]], str] | None
) -> tuple[str, dict[str, Any]]:
    """The prompt of a line as text, and the line as it is."""
    try:
        row = strict_json(line)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: not JSON: {error}") from None
    if (
        not isinstance(row, dict)
        or not (isinstance(row.get("prompt"), str) or is_messages(row.get("prompt")))
        or "label" not in row
    ):
        raise UserError(
            f'{where}: expected an object with "prompt" (text, or a list of messages '
            'with "role" and "content") and "label"'
        )
    text = row["prompt"]
    try:
        if not isinstance(text, str):
            if render is None:
                raise UserError("the prompt is a list of messages, not text")
            text = render(text)
        text.encode()
        if len(text) > MOST_CHARACTERS:
            raise UserError(
                f"the prompt has {len(text)} characters; {MOST_CHARACTERS} are the most"
            )
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
    except UnicodeEncodeError as error:  # half of a surrogate pair
        raise UserError(f"{where}: the prompt is no valid text: {error}") from None
    return text, row


def _prompt(
    index: int, text: str, token_ids: Sequence[int], row: dict[str, Any], place: str
) -> Prompt:
    """Of `row` as the file has it, all but the prompt and the label is left in Prompt.row."""
    prompt, label = row.pop("prompt"), row.pop("label")
    messages = None if isinstance(prompt, str) else prompt
    return Prompt(index, text, tuple(token_ids), label, messages, row, place)


def is_messages(value: object) -> bool:
    """Whether it is a list of messages, with nothing but text in them."""
    return (
        isinstance(value, list)
        and bool(value)
        and all(
            isinstance(message, dict)
            and isinstance(message.get("role"), str)
            and isinstance(message.get("content"), str)
            for message in value
        )
    )


def refuse_changed(prompts: PromptSource, digest: str | None, data: DataConfig) -> None:
    """Hold the prompts to those that a run was trained on.

    Args:
        digest: of the run's prompts, from its checkpoint; None: one from before there were digests.

    Raises:
        UserError: they are others, and data.changed does not allow that.
    """
    if digest not in (None, prompts.digest) and data.changed == "refuse":
        raise UserError(
            f"data.prompts: {data.prompts} does not have the prompts that this run was trained "
            "on (token ids, labels or order differ), so its position means nothing there: put "
            "the prompts back as they were, start a new run (resume=none, or another run_dir), "
            "or go on with these from here (data.changed=accept)"
        )


class PromptSource:
    """Hands out prompts in an order that follows from (seed, position) alone.

    A position counts prompts over all epochs; every epoch is shuffled anew.  Each position is
    trained on once: what is handed out and not used is given back, and comes first the next time.
    """

    def __init__(self, prompts: list[Prompt], seed: int):
        self.prompts = prompts
        self.seed = seed
        self.cursor = 0
        """First position that was never handed out."""
        self.returned: list[int] = []
        """Positions below it that were given back, ascending."""
        self._epoch, self._order = -1, list(range(len(prompts)))

    @cached_property
    def digest(self) -> str:
        """Of all that samples depend on: token ids and labels, in the file's order."""
        digest = hashlib.blake2b(digest_size=16)
        for prompt in self.prompts:
            digest.update(json.dumps([prompt.token_ids, prompt.label], sort_keys=True).encode())
        return digest.hexdigest()

    def take(self, count: int) -> list[int]:
        """The next `count` positions, those given back first."""
        taken = self.returned[:count]
        del self.returned[:count]
        fresh = range(self.cursor, self.cursor + count - len(taken))
        self.cursor = fresh.stop
        return [*taken, *fresh]

    def give_back(self, positions: Iterable[int]) -> None:
        """Positions that were taken and not used."""
        self.returned = sorted({*self.returned, *positions})
        # One state for one future: what was handed out last and came back was never handed out.
        while self.returned and self.returned[-1] == self.cursor - 1:
            self.cursor = self.returned.pop()

    def at(self, position: int) -> Prompt:
        """The prompt of a position."""
        epoch, place = divmod(position, len(self.prompts))
        if epoch != self._epoch:
            self._epoch, self._order = epoch, list(range(len(self.prompts)))
            Random(f"{self.seed}/prompts/{epoch}").shuffle(self._order)
        return self.prompts[self._order[place]]

    def state(self) -> dict[str, Any]:
        return {"cursor": self.cursor, "returned": list(self.returned)}

    def restore(self, state: dict[str, Any]) -> None:
        """Continue where `state` was taken."""
        positions = [state["cursor"], *state["returned"]]
        if any(type(one) is not int or not 0 <= one < 2**53 for one in positions):
            raise ValueError(f"positions are {positions!r:.100}")
        self.cursor, self.returned = positions[0], positions[1:]
