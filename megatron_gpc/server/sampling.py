"""Drawing tokens: what a request may ask for, and one vectorised draw for a whole batch."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.random.bit_generator import ISeedSequence

from megatron_gpc.config.types import MOST_STOP_LENGTH, MOST_STOP_TEXTS
from megatron_gpc.errors import UserError

GREEDY_BELOW = 1e-6
"""Temperatures below this mean: take the most likely token."""
LONE_SURROGATE = re.compile("[\ud800-\udfff]")
"""Half a UTF-16 pair, which JSON can say and nothing can encode."""
MOST_TEMPERATURE = 1e6
"""Above it all tokens are equally likely, in fp32."""
MOST_TOKENS = 2**31 - 1
"""No context and no vocabulary has more."""
MOST_SAMPLES_A_PROMPT = 4096
"""Of one prompt."""


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
        _check_values(params)
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
                isinstance(text, str) and text and not LONE_SURROGATE.search(text) for text in texts
            )
        elif name == "sampling_seed":
            right = value is None or type(value) is int
        else:
            right = type(value) in wanted.get(name, (int,))
        if not right:
            raise UserError(f"sampling_params: {name} has the wrong type: {_shown(value)}")


def _check_values(params: SamplingParams) -> None:
    """Comparisons only, which every int and float can do: 10**400 is no float, and NaN fails."""
    seed = params.sampling_seed
    for name, right, must in (
        ("temperature", 0 <= params.temperature < float("inf"), "be a non-negative finite number"),
        ("temperature", params.temperature <= MOST_TEMPERATURE, f"be at most {MOST_TEMPERATURE:g}"),
        ("top_p", 0 < params.top_p <= 1, "be in (0, 1]"),
        (
            "top_k",
            params.top_k == -1 or 1 <= params.top_k <= MOST_TOKENS,
            "be -1 (all tokens) or from 1 to 2**31 - 1",
        ),
        ("max_new_tokens", 1 <= params.max_new_tokens <= MOST_TOKENS, "be from 1 to 2**31 - 1"),
        (
            "min_new_tokens",
            0 <= params.min_new_tokens <= params.max_new_tokens,
            f"be in [0, max_new_tokens={params.max_new_tokens}]",
        ),
        ("n", 1 <= params.n <= MOST_SAMPLES_A_PROMPT, f"be from 1 to {MOST_SAMPLES_A_PROMPT}"),
        ("sampling_seed", seed is None or 0 <= seed < 2**64, "be in [0, 2**64)"),
    ):
        if not right:
            raise UserError(f"{name} must {must}, got {_shown(getattr(params, name))}.")
    if len(params.stop) > MOST_STOP_TEXTS or any(len(t) > MOST_STOP_LENGTH for t in params.stop):
        raise UserError(
            f"stop must have at most {MOST_STOP_TEXTS} texts of at most {MOST_STOP_LENGTH} "
            "characters."
        )


def _shown(value: object) -> str:
    """For an error, at most so long that it stays one line."""
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


class _Key(ISeedSequence):
    """The key of a Philox generator.  (Given as `key`, numpy first asks the OS for a seed, for
    nothing, which takes more than half of the time.)"""

    def __init__(self, *words: int):
        self.words = np.array(words, dtype=np.uint64)

    def generate_state(self, n_words: int, dtype: Any = np.uint32) -> np.ndarray:
        return self.words


class Uniforms:
    """float64 in [0, 1): number i decides token i of a sample.

    They depend on the seed, the sample's index among the `n` of its request, and i alone: Philox
    is a counter-based generator, keyed here by seed and index, counting token positions.  They are
    made as they are needed, so that a sample that may be long costs nothing yet.
    """

    def __init__(self, seed: int, sample_index: int):
        key: Any = _Key(seed, sample_index)
        self._philox = np.random.Philox(key)
        self._made: list[float] = []

    def __getitem__(self, i: int) -> float:
        while i >= len(self._made):
            bits = self._philox.random_raw(64)
            self._made += ((bits >> np.uint64(11)) * 2.0**-53).tolist()
        return self._made[i]


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
    temperature_B = torch.tensor([p.temperature for p in params], dtype=torch.float32)
    temperature_B[greedy_B] = 1.0
    logp_BV = torch.log_softmax(logits_BV / temperature_B[:, None], dim=-1)
    probs_BV = logp_BV.exp().double()
    cut = [row for row, p in enumerate(params) if (p.top_k > 0 or p.top_p < 1) and not p.greedy]
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
