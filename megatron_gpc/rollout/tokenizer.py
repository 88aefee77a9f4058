"""The tokenizer of a model folder."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from megatron_gpc.errors import UserError

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
