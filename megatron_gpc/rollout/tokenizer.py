"""The tokenizer of a model folder."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_gpc.errors import UserError
from megatron_gpc.rollout.prompts import Message

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """A Hugging Face folder's tokenizer.

    Raises:
        UserError: no tokenizer in the folder, or a damaged one.
    """
    from transformers import AutoTokenizer  # seconds of import, which only rank 0 spends

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError, TypeError) as error:  # it does not check what it reads
        raise UserError(f"{folder}: cannot load the tokenizer: {error!r}") from None
    # Without files it is made from the model's class and knows nothing but special tokens.
    if len(tokenizer) <= len(tokenizer.all_special_ids):
        raise UserError(
            f"{folder} has no tokenizer (tokenizer.json); copy the tokenizer's files there"
        )
    return tokenizer


def encoder(tokenizer: PreTrainedTokenizerBase) -> Callable[[str], list[int]]:
    """Text -> token ids, with nothing added before or after."""
    return lambda text: tokenizer(text, add_special_tokens=False)["input_ids"]


def chat_renderer(
    tokenizer: PreTrainedTokenizerBase, variables: Mapping[str, Any]
) -> Callable[[list[Message]], str]:
    """Messages -> what the model is to go on from, by the tokenizer's chat template.

    Args:
        variables: of the template.

    Raises:
        UserError: a variable has the name of what is given anyway.
    """
    taken = sorted({"conversation", "messages", "tokenize", "add_generation_prompt"} & {*variables})
    if taken:
        raise UserError(f"data.chat_template: {taken[0]} cannot be set: the prompt decides it")

    def render(messages: list[Message]) -> str:
        if not tokenizer.chat_template:
            raise UserError(
                f"{tokenizer.name_or_path} has no chat template, but prompts are lists of "
                "messages; add one, or make them text (tools/convert_prompts.py --text)"
            )
        return tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True, **variables
        )

    return render
