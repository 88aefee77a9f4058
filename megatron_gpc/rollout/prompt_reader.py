"""The prompts of a run and what ends their answers, held to what model and engines can take."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from megatron_gpc.config import Config
from megatron_gpc.errors import UserError
from megatron_gpc.rollout.evaluation import as_evaluated
from megatron_gpc.rollout.prompts import Limit, read_prompts
from megatron_gpc.rollout.stops import find_stops
from megatron_gpc.rollout.tokenizer import chat_renderer, encoder, load_tokenizer
from megatron_gpc.types import Prompt
from megatron_gpc.weights import family_of
from megatron_gpc.weights.folders import hf_folder, read_hf_config

_LONGER_CONTEXT = "SGLANG_ALLOW_OVERWRITE_LONGER_CONTEXT_LEN"


class PromptReader:
    """Reads the prompts of a run.

    Args:
        config: the run.
        model: Hugging Face folder or converted checkpoint; its configuration and tokenizer count.
        say: is told how many prompts were left out, if any.

    Raises:
        UserError: no tokenizer, a damaged one, variables that a chat template cannot have, or
            nothing that can end an answer.
    """

    def __init__(
        self, config: Config, model: Path, say: Callable[[str], object] = lambda text: None
    ):
        self.config, self.say = config, say
        self.hf = read_hf_config(model)
        self.tokenizer = load_tokenizer(hf_folder(model))
        vocabulary = family_of(self.hf).model_fields(self.hf).vocab_size
        self.stops = find_stops(config, self.tokenizer, hf_folder(model), vocabulary)
        self._render = chat_renderer(self.tokenizer, config.data.chat_template)

    def training(self) -> list[Prompt]:
        """Those of data.prompts.

        Raises:
            UserError: names file and line of what cannot be used.
        """
        return self._read(self.config.data.prompts, prompt_limit(self.config, self.hf))

    def held_out(self) -> list[Prompt]:
        """Those of eval.prompts; empty if that is not set.

        Raises:
            UserError: names file and line of what cannot be used.
        """
        file = self.config.eval.prompts
        if file is None:
            return []
        return self._read(file, prompt_limit(self.config, self.hf, held_out=True))

    def _read(self, file: Path, limit: Limit) -> list[Prompt]:
        return read_prompts(file, encoder(self.tokenizer), self._render, limit, self.say)


def prompt_limit(config: Config, hf: Mapping[str, Any], held_out: bool = False) -> Limit:
    """What prompts have to fit into: the context, less the longest response.

    Args:
        hf: the model's config.json.
        held_out: for the prompts of eval.prompts.

    Raises:
        UserError: the longest response leaves no room for a prompt.
    """
    own = held_out and config.eval.max_response_tokens is not None
    key = f"{'eval' if own else 'rollout'}.max_response_tokens"
    longest = (as_evaluated(config) if held_out else config).rollout.max_response_tokens
    context, reason = context_length(config, hf)
    reason = f"{key}={longest}, {reason}"
    tokens = context - longest
    if tokens < 1:
        raise UserError(f"no prompt fits: {reason}; lower {key}")
    most = config.data.max_prompt_tokens
    if most is not None and most <= tokens:
        tokens, reason = most, f"data.max_prompt_tokens={most}"
    vocabulary = family_of(hf).model_fields(hf).vocab_size
    return Limit(tokens, reason, vocabulary, drop=config.data.too_long == "drop")


def context_length(config: Config, hf: Mapping[str, Any]) -> tuple[int, str]:
    """(most tokens of prompt and response together, what says so), as the engines count.

    The embedded server takes max_position_embeddings as it is.  SGLang multiplies it by the factor
    of a scaled rotary embedding, unless that comes with its own original length
    (hf_transformers_utils.get_context_length), and `context_length` among its arguments replaces
    it.

    Raises:
        UserError: SGLang would not start with that context_length.
    """
    own = family_of(hf).model_fields(hf).max_position_embeddings
    server = config.rollout.server
    if server.kind == "embedded" and not (server.urls or server.urls_file):
        return own, f"max_position_embeddings={own} in config.json"
    rope = hf.get("rope_parameters") or hf.get("rope_scaling") or {}
    factor = 1 if "original_max_position_embeddings" in rope else rope.get("factor") or 1
    derived = int(own * factor)
    said = f"max_position_embeddings={own} in config.json"
    said += f" times the rotary embedding's factor {factor:g}" if factor != 1 else ""
    arguments = {name.replace("-", "_"): value for name, value in config.sglang.args.items()}
    given = arguments.get("context_length")
    if given is None:
        return derived, said
    if not isinstance(given, int) or isinstance(given, bool) or given < 1:
        raise UserError(f"sglang.args.context_length: expected a whole number, got {given!r}")
    allowed = {**os.environ, **config.sglang.environment}.get(_LONGER_CONTEXT, "")
    if given > derived and allowed.lower() not in ("1", "true", "yes", "y"):
        raise UserError(
            f"sglang.args.context_length={given} is more than {said}, and SGLang would not start; "
            f"lower it, or set sglang.environment.{_LONGER_CONTEXT}=1"
        )
    return given, f"sglang.args.context_length={given}"
