"""Prompts: a JSON-lines file, shuffled anew every epoch, handed out from a cursor."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from random import Random

from megatron_gpc.errors import UserError
from megatron_gpc.types import Prompt


def read_prompts(file: Path, tokenize: Callable[[str], list[int]]) -> list[Prompt]:
    """All prompts of a file.

    Args:
        file: one JSON object a line: `prompt` (text) and `label` (whatever the verifier needs).
        tokenize: text -> token ids.

    Raises:
        UserError: names file and line of what cannot be used.
    """
    try:
        lines = file.read_text().splitlines()
    except OSError as error:
        raise UserError(f"{file}: cannot read prompts: {error.strerror}") from None
    prompts = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise UserError(f"{file}:{number}: not JSON: {error}") from None
        if (
            not isinstance(row, dict)
            or not isinstance(row.get("prompt"), str)
            or "label" not in row
        ):
            raise UserError(f'{file}:{number}: expected an object with "prompt" (text) and "label"')
        token_ids = tuple(tokenize(row["prompt"]))
        if not token_ids:
            raise UserError(f"{file}:{number}: the prompt has no tokens")
        prompts.append(Prompt(len(prompts), row["prompt"], token_ids, row["label"]))
    if not prompts:
        raise UserError(f"{file}: no prompts in it")
    return prompts


class PromptSource:
    """Hands out prompts in an order that follows from (seed, cursor) alone."""

    def __init__(self, prompts: list[Prompt], seed: int, cursor: int = 0):
        self.prompts = prompts
        self.seed = seed
        self.cursor = cursor
        """Prompts handed out so far, over all epochs; with the seed it is the whole state."""

    def take(self, count: int) -> list[Prompt]:
        """The next `count` prompts; a new epoch begins, shuffled anew, where one ends."""
        size = len(self.prompts)
        taken: list[Prompt] = []
        while len(taken) < count:
            epoch, position = divmod(self.cursor, size)
            order = list(range(size))
            Random(f"{self.seed}/prompts/{epoch}").shuffle(order)
            part = order[position : position + count - len(taken)]
            taken += [self.prompts[i] for i in part]
            self.cursor += len(part)
        return taken
