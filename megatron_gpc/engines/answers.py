"""What a rollout server may answer: nothing unchecked becomes training data."""

from __future__ import annotations

import base64
import math
from dataclasses import dataclass
from typing import Any, Literal

import httpx
import numpy as np

from megatron_gpc.types import Experts, Span, is_usable

LOGPROB_TOLERANCE = 1e-3
"""A log-probability above 0 by more than this is no rounding error."""


class RolloutError(RuntimeError):
    """The server could not do what was asked of it.

    The command line prints it alone, without a traceback, and exits with code 1: it is neither the
    user's input nor this code that failed.
    """


class ServerUnavailable(RolloutError):
    """No connection, no answer in time, or an error of the server's own (5xx), every time."""


class RequestRefused(RolloutError):
    """The server says that the request is wrong (4xx); asking again would not help."""

    def __init__(self, status: int, message: str):
        super().__init__(message)
        self.status = status


class MalformedAnswer(RolloutError):
    """An answer that cannot be true: nothing in it may be trained on."""


@dataclass(frozen=True)
class Generation:
    """One sample, checked."""

    token_ids: tuple[int, ...]
    """The stop token included."""
    logprobs: tuple[float, ...]
    """Of each token [nats], under the temperature-scaled distribution."""
    text: str
    finish_reason: Literal["stop", "length", "abort"]
    weight_versions: tuple[Span, ...]
    weight_loads: int | None = None
    """How often the server's weights had been replaced by then; SGLang does not say."""
    routes: bytes = b""
    """As Sample's."""


def read_generation(
    answer: Any,
    rid: str,
    sampling_params: dict[str, Any],
    input_tokens: int = 0,
    experts: Experts | None = None,
) -> Generation:
    """One answer of /generate, checked.

    Args:
        input_tokens: how many were sent.
        experts: which of them the tokens went to was asked for.

    Raises:
        MalformedAnswer: names the rid and what is wrong.
    """

    def require(condition: bool, problem: str) -> None:
        if not condition:
            raise MalformedAnswer(f"request {rid}: {problem}")

    try:
        meta, ids, text = answer["meta_info"], answer["output_ids"], answer["text"]
        reason = meta["finish_reason"]["type"]
        version = meta["weight_version"]
        pairs = meta["output_token_logprobs"]
        logprobs = [pair[0] for pair in pairs]
        # Older servers name one version for the whole sample.
        spans = tuple(
            (span["version"], span["start"], span["end"])
            for span in meta.get(
                "weight_versions", [{"version": version, "start": 0, "end": len(ids)}]
            )
        )
        paired_ids = [pair[1] for pair in pairs]
    except (KeyError, TypeError, IndexError) as error:
        raise MalformedAnswer(f"request {rid}: {type(error).__name__}: {error}") from None
    require(reason in ("stop", "length", "abort"), f"unknown finish reason {reason!r}")
    require(bool(ids) or reason == "abort", "no tokens")
    require(paired_ids == ids, f"{len(pairs)} log-probs do not belong to {len(ids)} tokens")
    limit = sampling_params.get("max_new_tokens")
    require(limit is None or len(ids) <= limit, f"{len(ids)} tokens, more than the {limit} allowed")
    for token, logprob in zip(ids, logprobs, strict=True):
        if type(token) is not int or token < 0:  # thousands a step: no message is made for nothing
            require(False, f"token {token!r} is not in the vocabulary")
        if not is_usable(logprob) or logprob > LOGPROB_TOLERANCE:
            require(False, f"log-prob {logprob!r:.40} of token {token}")
    bounds = [0, *(end for _, _, end in spans)]
    require(
        [start for _, start, _ in spans] == bounds[:-1] and bounds[-1] == len(ids),
        f"weight versions {spans} do not cover {len(ids)} tokens",
    )
    loads, routes = meta.get("weight_loads"), b""
    if experts is not None and ids:
        try:
            routes = _routes(meta.get("routed_experts"), input_tokens + len(ids) - 1, experts)
        except ValueError as error:
            raise MalformedAnswer(f"request {rid}: routed_experts: {error}") from None
    return Generation(tuple(ids), tuple(map(float, logprobs)), text, reason, spans, loads, routes)


def _routes(encoded: Any, tokens: int, experts: Experts) -> bytes:
    """Routes as a sample has them, of base64 of int32 [tokens, all layers, experts a token].

    Raises:
        ValueError: they are no such thing.
    """
    if not isinstance(encoded, str):
        raise ValueError(
            "the server does not tell them; start SGLang with --enable-return-routed-experts"
        )
    values = np.frombuffer(base64.b64decode(encoded, validate=True), dtype="<i4")
    shape = tokens, experts.model_layers, experts.topk
    if values.size != math.prod(shape):
        raise ValueError(f"{values.size} numbers, and not {' x '.join(map(str, shape))}")
    routes = values.reshape(shape)[:, list(experts.layers)]
    if why := untrue_routes(routes, experts):
        raise ValueError(why)
    return routes.astype("<i2").tobytes()


def untrue_routes(routes: np.ndarray, experts: Experts) -> str:
    """Why these cannot be a token's experts; "" if they can.

    Args:
        routes: [..., experts a token].
    """
    if routes.size and not (routes.min() >= 0 and routes.max() < experts.count):
        return f"experts are numbered from 0 to {experts.count - 1}"
    ordered = np.sort(routes, axis=-1)
    return "an expert comes twice" if (ordered[..., 1:] == ordered[..., :-1]).any() else ""


def answer_json(response: httpx.Response) -> Any:
    try:
        return response.json()
    except ValueError as error:
        raise MalformedAnswer(f"{response.url}: not JSON: {error}") from None


def error_message(response: httpx.Response) -> str:
    """The error's text, whichever of SGLang's shapes it has."""
    try:
        content = response.json()
    except ValueError:
        return response.text.strip()[:500]
    if isinstance(content, dict):
        error = content.get("error")
        if isinstance(error, dict):
            return str(error.get("message"))
        return str(content.get("message", content))
    return str(content)[:500]
