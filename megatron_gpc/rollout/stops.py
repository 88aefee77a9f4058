"""What ends an answer: the tokens and strings that a rollout asks its engines to stop at."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_gpc.config.schema import Config
from megatron_gpc.errors import UserError
from megatron_gpc.rollout.tokenizer import eos_tokens, rendering
from megatron_gpc.run.files import read_json

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_CONTENT = "ANSWER0123456789"
"""Stands for an answer where a template is rendered; no template has it itself."""


@dataclass(frozen=True)
class Stops:
    """What ends an answer."""

    token_ids: tuple[int, ...]
    strings: tuple[str, ...]
    """Of more than one token, or a part of one; answers end with the token that completes it."""
    said: str
    """All of them and where each comes from, in one line."""

    @property
    def sampling(self) -> dict[str, Any]:
        """The strings as a sampling parameter, in SGLang's name."""
        return {"stop": list(self.strings)} if self.strings else {}


def find_stops(
    config: Config, tokenizer: PreTrainedTokenizerBase, folder: Path, vocab_size: int
) -> Stops:
    """The tokenizer's eos, generation_config.json's, and rollout.stop or, if that is left out,
    what the chat template puts after an answer.

    Args:
        folder: of the model, with generation_config.json if it has one.
        vocab_size: of the model; tokens from there on cannot be drawn.

    Raises:
        UserError: a stop token outside the vocabulary, an empty string, nothing that ends an
            answer, or rollout.partial with a string.
    """
    ids: dict[int, list[str]] = {}
    strings: dict[str, str] = {}

    def add(stop: int | str, source: str) -> None:
        found = stop if isinstance(stop, int) else _as_token(tokenizer, stop)
        if isinstance(found, str):
            strings.setdefault(found, source)
            return
        if not 0 <= found < vocab_size:
            raise UserError(
                f"{source}: token {found} is outside the model's vocabulary, 0 to {vocab_size - 1}"
            )
        ids.setdefault(found, []).append(source)

    for token in eos_tokens(tokenizer):
        add(token, "the tokenizer's eos")
    for token in _generation_config(folder):
        add(token, "generation_config.json")
    if config.rollout.stop is None:
        end = end_of_turn(tokenizer, config.data.chat_template)
        if end is not None:
            add(end, "the chat template's end of turn")
    else:
        for stop in config.rollout.stop:
            if stop == "":
                raise UserError("rollout.stop: an empty string ends every answer; leave it out")
            add(stop, "rollout.stop")
    if not ids and not strings:
        raise UserError(
            f"{folder}: nothing says what ends an answer (no eos token, generation_config.json or "
            "chat template); set rollout.stop"
        )
    if strings and config.rollout.partial:
        raise UserError(
            f"rollout.partial=true: an answer cannot go on in the middle of {next(iter(strings))!r}"
            ", which is not one token; set rollout.stop to tokens, or leave rollout.partial out"
        )
    said = [
        f"{tokenizer.decode([t])!r} ({t}, {', '.join(dict.fromkeys(w))})" for t, w in ids.items()
    ]
    said += [f"{text!r} ({source})" for text, source in strings.items()]
    return Stops(tuple(ids), tuple(strings), "an answer ends at: " + ", ".join(said))


def end_of_turn(
    tokenizer: PreTrainedTokenizerBase, variables: Mapping[str, Any]
) -> str | int | None:
    """What the chat template puts after an answer: its first special token, else the text up to the
    end of the line; None if there is no template, or it adds nothing but white space.

    Args:
        variables: of the template.
    """
    if not tokenizer.chat_template:
        return None
    conversation = [{"role": "user", "content": "?"}, {"role": "assistant", "content": _CONTENT}]
    try:
        with rendering():
            text = tokenizer.apply_chat_template(conversation, tokenize=False, **variables)
    except Exception:  # a template runs any code; prompts that it refuses are named elsewhere
        return None
    _, found, rest = str(text).rpartition(_CONTENT)
    rest = rest.lstrip()
    if not found or not rest:
        return None
    special = [
        (rest.find(token), -len(token), number)
        for token, number in _added_tokens(tokenizer).items()
        if token in rest
    ]
    line = rest.splitlines()[0].rstrip()
    if special:
        at, _, number = min(special)
        if not rest[:at].strip():
            return number
        line = rest[:at].splitlines()[0].rstrip()
    return line


def _as_token(tokenizer: PreTrainedTokenizerBase, text: str) -> int | str:
    """The token that is this text, if no other has it inside; else the text."""
    added = _added_tokens(tokenizer)
    if text in added:
        return added[text]
    found = tokenizer(text, add_special_tokens=False)["input_ids"]
    if len(found) == 1 and tokenizer.decode(found) == text:
        others = tokenizer.batch_decode([[number] for number in range(len(tokenizer))])
        if sum(text in other for other in others) == 1:
            return found[0]
    return text


def _added_tokens(tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    """Tokens that are always one, special or not -> their number."""
    special = zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True)
    added = {token.content: number for number, token in tokenizer.added_tokens_decoder.items()}
    return {**dict(special), **added}


def _generation_config(folder: Path) -> Sequence[int]:
    """End tokens of generation_config.json.

    Raises:
        UserError: not JSON, or no token numbers.
    """
    file = folder / "generation_config.json"
    try:
        found = read_json(file).get("eos_token_id")
    except FileNotFoundError:
        return ()
    tokens = found if isinstance(found, list) else [] if found is None else [found]
    if not all(type(token) is int for token in tokens):
        raise UserError(f"{file}: eos_token_id must be a token's number or a list, got {found!r}")
    return tokens
