"""Drawing tokens: what a request may ask for, and one vectorised draw for a whole batch."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from megatron_gpc.errors import UserError

GREEDY_BELOW = 1e-6
"""Temperatures below this mean: take the most likely token."""


@dataclass(frozen=True)
class SamplingParams:
    """SGLang's sampling parameters, as far as the generator has them, with SGLang's defaults."""

    max_new_tokens: int = 128
    min_new_tokens: int = 0
    """Stop tokens have probability 0 until the sample has this many tokens."""
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = -1
    """Draw among so many most likely tokens; -1: among all."""
    n: int = 1
    """Samples of this prompt."""
    stop_token_ids: tuple[int, ...] = ()
    """Tokens that end the sample, besides the model's own end tokens."""
    stop: tuple[str, ...] = ()
    """Texts that end the sample; special tokens count as their text."""
    ignore_eos: bool = False
    """Nothing but max_new_tokens and `stop` ends the sample, not even stop_token_ids."""
    sampling_seed: int | None = None
    """Decides the draw, whatever else runs in the batch; left out, drawn from the OS."""

    @classmethod
    def parse(cls, values: dict[str, Any]) -> SamplingParams:
        """Check what came over the wire.

        Raises:
            UserError: unknown parameter, wrong type or value out of range.
        """
        known = {field.name for field in dataclasses.fields(cls)}
        unknown = sorted(set(values) - known)
        if unknown:
            raise UserError(
                f"sampling_params: the embedded server has no {unknown[0]!r}; "
                f"it has {', '.join(sorted(known))}"
            )
        params = cls(**{key: value for key, value in values.items() if value is not None})
        _check_types(params)
        params = dataclasses.replace(
            params,
            stop_token_ids=tuple(params.stop_token_ids),
            stop=(params.stop,) if isinstance(params.stop, str) else tuple(params.stop),
        )
        if not (math.isfinite(params.temperature) and params.temperature >= 0):
            raise UserError(
                f"temperature must be a non-negative finite number, got {params.temperature}."
            )
        if not 0 < params.top_p <= 1:
            raise UserError(f"top_p must be in (0, 1], got {params.top_p}.")
        if params.top_k != -1 and params.top_k < 1:
            raise UserError(f"top_k must be -1 (all tokens) or at least 1, got {params.top_k}.")
        if params.max_new_tokens < 1:
            raise UserError(f"max_new_tokens must be at least 1, got {params.max_new_tokens}.")
        if not 0 <= params.min_new_tokens <= params.max_new_tokens:
            raise UserError(
                "min_new_tokens must be in [0, max_new_tokens="
                f"{params.max_new_tokens}], got {params.min_new_tokens}."
            )
        if params.n < 1:
            raise UserError(f"n must be at least 1, got {params.n}.")
        if params.sampling_seed is not None and not 0 <= params.sampling_seed < 2**64:
            raise UserError(f"sampling_seed must be in [0, 2**64), got {params.sampling_seed}.")
        return params

    @property
    def greedy(self) -> bool:
        return self.temperature < GREEDY_BELOW


def _check_types(params: SamplingParams) -> None:
    wanted = {"temperature": (int, float), "top_p": (int, float), "ignore_eos": (bool,)}
    for name, value in vars(params).items():
        if name == "stop_token_ids":
            right = isinstance(value, list | tuple) and all(type(token) is int for token in value)
        elif name == "stop":
            texts = [value] if isinstance(value, str) else value
            right = isinstance(texts, list | tuple) and all(
                isinstance(text, str) and text for text in texts
            )
        elif name == "sampling_seed":
            right = value is None or type(value) is int
        else:
            right = type(value) in wanted.get(name, (int,))
        if not right:
            raise UserError(f"sampling_params: {name} has the wrong type: {value!r}")


def uniforms(seed: int, sample_index: int, count: int) -> np.ndarray:
    """[count] float64 in [0, 1): number i decides token i of a sample.

    They depend on the seed, the sample's index among the `n` of its request, and i alone: Philox
    is a counter-based generator, keyed here by seed and index, counting token positions.
    """
    bits = np.random.Philox(key=np.array([seed, sample_index], dtype=np.uint64)).random_raw(count)
    return (bits >> np.uint64(11)) * 2.0**-53


def draw(
    logits_BV: torch.Tensor, params: Sequence[SamplingParams], uniforms_B: np.ndarray
) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw one token a row, by inverting the cumulative distribution in float64.

    Args:
        logits_BV: fp32, before the temperature.
        params: of each row.
        uniforms_B: one number in [0, 1) a row; not looked at in greedy rows.

    Returns:
        tokens [B] int64, and their log-probs [B] fp32 under softmax(logits / temperature), the
        distribution before top-k and top-p cut it; greedy rows are taken at temperature 1.
    """
    greedy_B = torch.tensor([p.greedy for p in params])
    temperature_B = torch.tensor([1.0 if p.greedy else p.temperature for p in params])
    logp_BV = torch.log_softmax(logits_BV / temperature_B[:, None], dim=-1)
    probs_BV = logp_BV.exp().double()
    cut = [row for row, p in enumerate(params) if not p.greedy and (p.top_k > 0 or p.top_p < 1)]
    if cut:
        probs_BV[cut] = _cut_tail(probs_BV[cut], [params[row] for row in cut])
    cumulative_BV = probs_BV.cumsum(dim=-1)
    total_B = cumulative_BV[:, -1]
    # Below the total, which rounding may reach, so that the token has a positive probability.
    target_B = torch.minimum(
        torch.from_numpy(uniforms_B) * total_B, torch.nextafter(total_B, torch.zeros_like(total_B))
    )
    tokens_B = torch.searchsorted(cumulative_BV, target_B[:, None], right=True).squeeze(-1)
    tokens_B = torch.where(greedy_B, logits_BV.argmax(dim=-1), tokens_B)
    # NaN logits leave no token to find; the index stays valid and the log-prob is NaN.
    tokens_B = tokens_B.clamp(max=logits_BV.shape[-1] - 1)
    return tokens_B, logp_BV.gather(-1, tokens_B[:, None]).squeeze(-1)


def _cut_tail(probs_BV: torch.Tensor, params: Sequence[SamplingParams]) -> torch.Tensor:
    """Zero what is not among the top_k, and what comes after top_p of the probability."""
    vocabulary = probs_BV.shape[-1]
    top_k_B = torch.tensor([p.top_k if p.top_k > 0 else vocabulary for p in params])
    top_p_B = torch.tensor([p.top_p for p in params], dtype=torch.float64)
    sorted_BV, order_BV = probs_BV.sort(dim=-1, descending=True, stable=True)
    before_BV = sorted_BV.cumsum(dim=-1) - sorted_BV
    drop_BV = (torch.arange(vocabulary) >= top_k_B[:, None]) | (before_BV > top_p_B[:, None])
    return torch.zeros_like(probs_BV).scatter(-1, order_BV, sorted_BV.masked_fill(drop_BV, 0.0))
