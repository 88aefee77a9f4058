"""What the generator is asked for, what it answers, and a sample while it is being made."""

from __future__ import annotations

import math
import secrets
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

import torch

from megatron_gpc.server.sampling import SamplingParams, Uniforms
from megatron_gpc.types import Span, joined

ABORTED = {"type": "abort", "message": "Aborted", "status_code": None, "err_type": None}
"""Finish reason of a sample that somebody ended, as SGLang reports it."""


@dataclass(frozen=True, eq=False)
class Request:
    """One prompt; `params.n` samples of it are wanted."""

    rid: str
    input_ids: tuple[int, ...]
    params: SamplingParams
    routes: bool = False
    """Whether the experts that its tokens went to are wanted."""


@dataclass(frozen=True)
class Result:
    """One finished sample."""

    prompt_tokens: int
    token_ids: tuple[int, ...]
    """A stop token that ended the sample included."""
    logprobs: tuple[float, ...]
    """Of each token [nats], fp32, under the temperature-scaled distribution."""
    finish: dict[str, Any]
    """`{"type": "stop", "matched": token or text}`, `{"type": "length", "length": count}` or
    ABORTED."""
    weight_version: str
    """Version when the sample ended."""
    weight_versions: tuple[Span, ...]
    num_retractions: int
    routes: torch.Tensor | None = None
    """[tokens - 1, layers, experts a token] int32, of prompt and answer but the last token, which
    went through no layer; None if nobody wants them, or there are none."""


class RequestFailed(RuntimeError):
    """The generator could not do this request; it goes on with the others."""


class Job:
    """Requests that came together and are answered together."""

    def __init__(
        self,
        requests: Sequence[Request],
        end_tokens: frozenset[int],
        decode: Callable[[Sequence[int]], str] | None,
        future: Future[list[Result]],
    ):
        self.requests, self.decode = requests, decode
        self.sequences = [
            LiveSequence(self, request, index, end_tokens)
            for request in requests
            for index in range(request.params.n)
        ]
        self.failed = False
        self._future = future
        self._missing = len(self.sequences)

    def one_finished(self) -> None:
        self._missing -= 1
        if self._missing == 0 and not self.failed:
            self._future.set_result([sequence.result() for sequence in self.sequences])

    def fail(self, error: BaseException) -> None:
        """Answer with the error; the samples that still wait or run are `over`."""
        if not self.failed:
            self.failed = True
            self._future.set_exception(error)


@dataclass(eq=False)
class LiveSequence:
    """One sample of a request while it waits or runs."""

    job: Job
    request: Request
    sample_index: int
    end_tokens: frozenset[int]
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    versions: list[tuple[str, int]] = field(default_factory=list)
    """(version, index of the first token that it could make), in order."""
    finish: dict[str, Any] | None = None
    num_retractions: int = 0
    routes: list[torch.Tensor] = field(default_factory=list)
    """Those of the first tokens, in pieces: as each token was computed first."""
    alone: bool = False
    """It was in a pass that failed, with others; prefilled alone, it shows whose fault it is."""

    def __post_init__(self) -> None:
        params = self.request.params
        self.stop = frozenset() if params.ignore_eos else self.end_tokens | {*params.stop_token_ids}
        seed = params.sampling_seed
        self.uniforms = Uniforms(secrets.randbits(64) if seed is None else seed, self.sample_index)

    @property
    def over(self) -> bool:
        """Nothing is to be drawn any more."""
        return self.finish is not None or self.job.failed

    @property
    def context(self) -> tuple[int, ...]:
        """All tokens that the next one depends on."""
        return (*self.request.input_ids, *self.tokens) if self.tokens else self.request.input_ids

    def route(self, found: torch.Tensor) -> None:
        """Keep what is new of a forward pass over the end of its context.

        Args:
            found: [columns, layers, experts a token]; the last column is the last token's.
        """
        missing = len(self.context) - sum(map(len, self.routes))
        self.routes.append(found[len(found) - missing :].clone())

    def append(self, token: int, logprob: float) -> None:
        """As in SGLang, the length is checked first: a stop token at the limit counts as length."""
        if not math.isfinite(logprob):
            self.job.fail(
                FloatingPointError(
                    f"request {self.request.rid}: the model's output is not finite at token "
                    f"{len(self.tokens)} (weights {self.versions[-1][0]!r})"
                )
            )
            return
        self.tokens.append(token)
        self.logprobs.append(logprob)
        limit = self.request.params.max_new_tokens
        if len(self.tokens) >= limit:
            self.finish = {"type": "length", "length": limit}
        elif token in self.stop:
            self.finish = {"type": "stop", "matched": token}
        elif (text := self._stop_text()) is not None:
            self.finish = {"type": "stop", "matched": text}

    def _stop_text(self) -> str | None:
        """The first of the request's stop texts that the last token has completed."""
        texts = self.request.params.stop
        if not texts:
            return None
        assert self.job.decode is not None
        # a token has at least a byte of a text, so no more can have a part in it
        tail = self.job.decode(self.tokens[-max(len(text.encode()) for text in texts) :])
        return next((text for text in texts if text in tail), None)

    def result(self) -> Result:
        assert self.finish is not None, "asked before its end"
        ends = [start for _, start in self.versions[1:]] + [len(self.tokens)]
        spans = joined((*begun, end) for begun, end in zip(self.versions, ends, strict=True))
        routes = None
        if self.routes and self.tokens:
            routes = torch.cat(self.routes)[: len(self.context) - 1]
        return Result(
            prompt_tokens=len(self.request.input_ids),
            token_ids=tuple(self.tokens),
            logprobs=tuple(self.logprobs),
            finish=self.finish,
            weight_version=self.versions[-1][0],
            weight_versions=spans,
            num_retractions=self.num_retractions,
            routes=routes,
        )
