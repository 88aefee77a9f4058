"""Prompts: a JSON-lines file, shuffled anew every epoch, handed out from a cursor."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from random import Random
from typing import Any

from megatron_gpc.errors import UserError
from megatron_gpc.types import Prompt

Message = dict[str, str]
"""{role, content}"""


def read_prompts(
    file: Path,
    tokenize: Callable[[str], list[int]],
    render: Callable[[list[Message]], str] | None = None,
) -> list[Prompt]:
    """All prompts of a file.

    Args:
        file: one JSON object a line: `prompt` (text, or a list of messages) and `label` (whatever
            the verifier needs).
        tokenize: text -> token ids.
        render: messages -> text; None: there may be none.

    Raises:
        UserError: names file and line of what cannot be used.
    """
    try:
        lines = file.read_text("utf-8-sig").split("\n")  # splitlines() also splits inside strings
    except OSError as error:
        raise UserError(f"{file}: cannot read prompts: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{file}: cannot read prompts: not UTF-8 text: {error}") from None
    prompts = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{file}:{number}: not JSON: {error}") from None
        if (
            not isinstance(row, dict)
            or not (isinstance(row.get("prompt"), str) or is_messages(row.get("prompt")))
            or "label" not in row
        ):
            raise UserError(
                f'{file}:{number}: expected an object with "prompt" (text, or a list of messages '
                'with "role" and "content") and "label"'
            )
        text = row["prompt"]
        if not isinstance(text, str):
            if render is None:
                raise UserError(f"{file}:{number}: the prompt is a list of messages, not text")
            text = render(text)
        try:
            token_ids = tuple(tokenize(text))
        except UnicodeEncodeError as error:  # half of a surrogate pair
            raise UserError(f"{file}:{number}: the prompt is no valid text: {error}") from None
        if not token_ids:
            raise UserError(f"{file}:{number}: the prompt has no tokens")
        prompts.append(Prompt(len(prompts), text, token_ids, row["label"]))
    if not prompts:
        raise UserError(f"{file}: no prompts in it")
    return prompts


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
        self.cursor, self.returned = state["cursor"], list(state["returned"])
