"""Whether an engine's log-probs are the trainer's, for tokens that it has just sampled."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

from megatron_gpc.config import Config
from megatron_gpc.weights import family_of
from megatron_gpc.weights.folders import read_hf_config

SAMPLE_TOKENS = 32
"""Tokens of one sample of a probe; several short ones take fewer steps than a long one."""
MEAN = {"float32": 1e-3, "bfloat16": 0.1}
"""rollout.server.probe_tolerance, if it is left out [nats]."""
LOOSE = 50.0
"""How many times the mean's tolerance one token may differ: with bf16 a healthy engine's tokens
differ by 0.01 to 0.04 on average and by many times that now and then, the first one above all."""


@dataclass(frozen=True)
class Tolerance:
    """How far an engine's log-probs may be from the trainer's [nats]."""

    mean: float
    largest: float

    @classmethod
    def of(cls, config: Config) -> Tolerance:
        """As configured, or else that of the coarser of both sides' types."""
        mean = config.rollout.server.probe_tolerance
        if mean is None:
            mean = MEAN["float32" if _both_fp32(config) else "bfloat16"]
        return cls(mean, LOOSE * mean)

    def problem(self, gaps: Sequence[float]) -> str:
        """What is wrong with an engine, "" if nothing is.

        Args:
            gaps: difference for every token of its samples.
        """
        mean, largest = (fmean(gaps), max(gaps)) if gaps else (math.nan, math.nan)
        if mean <= self.mean and largest <= self.largest:
            return ""
        return (
            f"its log-probs differ from the trainer's by {mean:.3g} on average and by up to "
            f"{largest:.3g} after an update; rollout.server.probe_tolerance allows {self.mean:g} "
            f"on average, {self.largest:g} at most"
        )


def probe_size(tokens: int, max_response_tokens: int) -> tuple[int, int]:
    """(samples, tokens of each), for at least `tokens` tokens.

    >>> probe_size(256, 8192)
    (8, 32)
    """
    length = min(SAMPLE_TOKENS, max_response_tokens)
    return -(-tokens // length), length


def _both_fp32(config: Config) -> bool:
    server, asked = config.rollout.server, config.sglang.args.get("dtype", "auto")
    if config.model.dtype != "float32":
        return False
    if server.kind == "sglang" or server.urls or server.urls_file:
        return asked in ("float32", "float")  # left to itself SGLang takes 16 bits
    hf = read_hf_config(config.model.hf)  # the embedded server computes in the checkpoint's type
    return family_of(hf).model_fields(hf).dtype == "float32"
