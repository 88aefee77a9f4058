"""The embedded server's /generate: what a body asks for, and how a sample is described."""

from __future__ import annotations

import base64
import time
import uuid
from typing import Any

from transformers import PreTrainedTokenizerBase

from megatron_gpc.errors import UserError
from megatron_gpc.server import sequence
from megatron_gpc.server.protocol import GenerateBody
from megatron_gpc.server.sampling import SamplingParams

MOST_CHARACTERS = 64
"""Of a text, for every token of the context: a longer one is not even tokenized."""
MOST_SAMPLES_A_REQUEST = 2**16
"""Of one POST."""


def parse(
    body: GenerateBody, tokenizer: PreTrainedTokenizerBase, most_characters: int
) -> tuple[list[sequence.Request], list[bool], bool]:
    """Requests, which of them want log-probs, and whether they came as a single one.

    Raises:
        UserError: what SGLang refuses too, or more than fits the bounds.
    """
    if [] in (body.text, body.sampling_params):
        raise UserError("text and sampling_params must not be empty lists.")
    if body.input_ids is not None:
        single = not body.input_ids or isinstance(body.input_ids[0], int)
        prompts: list[Any] = [body.input_ids] if single else list(body.input_ids)
    elif body.text is not None:
        single = isinstance(body.text, str)
        texts = [body.text] if single else body.text
        if max(map(len, texts)) > most_characters:
            raise UserError(f"text has more than {most_characters} characters, too many to fit.")
        prompts = [tokenizer.encode(text) for text in texts]
    else:
        raise UserError("Either text, input_ids or input_embeds should be provided.")

    def per_prompt(name: str, value: Any) -> list[Any]:
        if not isinstance(value, list):
            return [value] * len(prompts)
        if len(value) != len(prompts):
            raise UserError(f"{name} has {len(value)} entries for {len(prompts)} prompts.")
        return value

    params = per_prompt("sampling_params", body.sampling_params or {})
    rids = per_prompt("rid", body.rid)
    if isinstance(body.rid, str) and not single:
        rids = [f"{body.rid}_{i}" for i in range(len(prompts))]
    requests = [
        sequence.Request(
            rid or uuid.uuid4().hex,
            tuple(ids),
            SamplingParams.parse(values),
            body.return_routed_experts,
        )
        for ids, values, rid in zip(prompts, params, rids, strict=True)
    ]
    if sum(request.params.n for request in requests) > MOST_SAMPLES_A_REQUEST:
        raise UserError(f"n: more than {MOST_SAMPLES_A_REQUEST} samples of one request.")
    return requests, per_prompt("return_logprob", body.return_logprob), single


def answer(
    result: sequence.Result,
    rid: str,
    logprob: bool,
    weight_loads: int,
    seconds: float,
    tokenizer: PreTrainedTokenizerBase,
) -> dict[str, Any]:
    """One sample, as SGLang describes it."""
    shown = result.token_ids
    matched = result.finish.get("matched")
    if isinstance(matched, int):  # the text is without what ended it
        shown = shown[:-1]
    text = str(tokenizer.decode(list(shown), skip_special_tokens=True))
    if isinstance(matched, str):
        text = text.partition(matched)[0]
    meta: dict[str, Any] = {
        "id": rid,
        "finish_reason": result.finish,
        "prompt_tokens": result.prompt_tokens,
        "weight_version": result.weight_version,
        "weight_loads": weight_loads,
        "num_retractions": result.num_retractions,
    }
    if logprob:
        meta["input_token_logprobs"] = []
        meta["output_token_logprobs"] = [
            (value, token, None)
            for value, token in zip(result.logprobs, result.token_ids, strict=True)
        ]
        meta["output_token_logprobs_length"] = len(result.token_ids)
    if result.routes is not None:
        meta["routed_experts"] = base64.b64encode(result.routes.numpy().tobytes()).decode("ascii")
    meta |= {
        "reasoning_tokens": 0,
        "completion_tokens": len(result.token_ids),
        "cached_tokens": 0,
        "weight_versions": [
            {"version": version, "start": start, "end": end}
            for version, start, end in result.weight_versions
        ],
        "cached_tokens_details": None,
        "dp_rank": None,
        "e2e_latency": seconds,
        "response_sent_to_client_ts": time.time(),
    }
    return {
        "text": text,
        "output_ids": result.token_ids,
        "meta_info": meta,
    }
