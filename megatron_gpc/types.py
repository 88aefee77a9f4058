"""Every object that crosses a module boundary, and the legend of the shape suffixes.

Shape suffixes (a name's last letters say its shape; the order of letters is the order of
dimensions):

    N  samples of a rollout (prompts x group size)      P  prompts of a rollout
    G  samples of one prompt (the group)                B  sequences of one micro-batch
    S  positions of one micro-batch, padding included   T  response tokens, packed without padding
    V  this rank's shard of the vocabulary              D  hidden size

Log-probabilities and entropies are natural (nats) and fp32.  They are those of the distribution
that the tokens were sampled from, that is, after division by the sampling temperature.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


LARGEST = 1e18
"""Of a reward, an advantage, a log-prob, a threshold, a loss: fp32 holds its square."""


def is_usable(value: object) -> bool:
    """Whether it is a number that can be computed with: no NaN, and nothing beyond LARGEST."""
    return isinstance(value, int | float) and -LARGEST <= value <= LARGEST


Span = tuple[str, int, int]
"""(version, start, end): which weights made the tokens start <= i < end of a response."""


@dataclass(frozen=True)
class Experts:
    """What the choices of a mixture's routers look like.

    >>> Experts(count=128, topk=8, layers=(1, 2, 3), model_layers=4)
    """

    count: int
    """Of a layer."""
    topk: int
    """How many of them a token goes to."""
    layers: tuple[int, ...]
    """Which layers have experts, counted from 0."""
    model_layers: int
    """All layers, those without experts included."""


@dataclass(frozen=True)
class Prompt:
    """One task instance.

    >>> Prompt(index=7, text="500=", token_ids=(53, 48, 48, 61), label={"target": 500})
    """

    index: int
    """Which prompt of its file it is, counted from 0."""
    text: str
    token_ids: tuple[int, ...]
    label: Any
    """Whatever the verifier needs to judge an answer; never shown to the policy."""
    messages: list[dict[str, str]] | None = None
    """[{role, content}] as the file has them; None if the prompt is text there."""
    row: dict[str, Any] = field(default_factory=dict)
    """Every other field of its line in the file."""
    place: str = ""
    """FILE:LINE, for messages."""


@dataclass(frozen=True)
class Verdict:
    """What a verifier says of an answer."""

    reward: float
    right: bool
    """What counts for pass@k, dynamic sampling and groups_all_right."""
    scores: dict[str, float] = field(default_factory=dict)
    """Further numbers of the verifier's, by name; their means become metrics."""


@dataclass(frozen=True)
class Sample:
    """One response to one prompt, as the rollout server returned it, then judged.

    >>> Sample(prompt, sample_index=0, token_ids=(49, 43, 36), logprobs=(-0.5, -1.2, -0.1),
    ...        text="1+$", finish_reason="stop", weight_versions=(("3", 0, 3),), reward=0.0)
    """

    prompt: Prompt
    sample_index: int
    """Position in the prompt's group, 0 <= sample_index < G."""
    token_ids: tuple[int, ...]
    """Response tokens, the stop token included."""
    logprobs: tuple[float, ...]
    """The server's log-probability of each response token [nats]."""
    text: str
    finish_reason: str
    """`stop` (the policy ended the answer), `length` (cut at the limit) or `abort`."""
    weight_versions: tuple[Span, ...]
    """The weights that made the tokens, in order.  A version is the trainer's count of finished
    steps, as a string."""
    reward: float = 0.0
    """The verifier's, less the penalty for length (rollout.overlong)."""
    right: bool = False
    """The verifier's word, whatever the length."""
    scores: dict[str, float] = field(default_factory=dict)
    routes: bytes = b""
    """Which experts every token of prompt and response went to, but for the last, which the server
    has not computed: int16 [tokens - 1, layers with experts, experts a token], little-endian.
    Empty: nobody asked (train.routing_replay)."""

    def judged(self, verdict: Verdict, penalty: float = 0.0) -> Sample:
        """The sample with its verdict and the penalty for its length."""
        reward = verdict.reward - penalty
        return replace(self, reward=reward, right=verdict.right, scores=verdict.scores)

    @staticmethod
    def from_plain(values: dict[str, Any]) -> Sample:
        """The sample that `dataclasses.asdict` was given."""
        return Sample(**{**values, "prompt": Prompt(**values["prompt"])})


def joined(spans: Iterable[Span]) -> tuple[Span, ...]:
    """Spans of tokens without the empty ones, neighbours of the same version as one."""
    found: list[Span] = []
    for version, start, end in spans:
        if found and found[-1][0] == version:
            found[-1] = (version, found[-1][1], end)
        elif end > start:
            found.append((version, start, end))
    return tuple(found)


@dataclass(frozen=True)
class Bounds:
    """The interval that the importance ratio r = p/q is kept in, affine in the current probability
    p.

        upper(p) = 1 + eps_plus(p)  = upper_slope * p + upper_intercept
        lower(p) = 1 - eps_minus(p) = lower_slope * p + lower_intercept

    Every schedule of METHOD (static, ID, DID, OD) gives such a pair of lines at every step, so
    these four numbers are all that the loss needs to know of it.  PPO's [0.8, 1.2]:

    >>> Bounds(upper_slope=0.0, upper_intercept=1.2, lower_slope=0.0, lower_intercept=0.8)
    """

    upper_slope: float
    upper_intercept: float
    lower_slope: float
    lower_intercept: float

    def eps_high_at(self, p: float) -> float:
        """eps_plus(p): how far above 1 the ratio may go."""
        return self.upper_slope * p + self.upper_intercept - 1.0

    def eps_low_at(self, p: float) -> float:
        """eps_minus(p): how far below 1 the ratio may go."""
        return 1.0 - (self.lower_slope * p + self.lower_intercept)


@dataclass(frozen=True)
class RolloutBatch:
    """All samples of one training step, packed; the same on every rank.

    Sample n is `tokens[starts_N[n] : starts_N[n] + prompt_lengths_N[n] + response_lengths_N[n]]`.
    Per-token values are packed over response tokens only, sample after sample: sample n's are at
    `response_slice(n)`.  A prompt of 2 tokens with responses of 3 and 1 tokens:

        tokens              5 6 | 7 8 9 || 5 6 | 8        int64
        starts_N            0, 5
        prompt_lengths_N    2, 2
        response_lengths_N  3, 1
        rollout_logp_T      four values
        rewards_N           two values
    """

    tokens: torch.Tensor
    starts_N: torch.Tensor
    prompt_lengths_N: torch.Tensor
    response_lengths_N: torch.Tensor
    rollout_logp_T: torch.Tensor
    """The server's log-probs of the response tokens."""
    rewards_N: torch.Tensor
    advantages_N: torch.Tensor
    routes: torch.Tensor | None = None
    """Which experts the rollout sent each of `tokens` to, int16 [tokens, layers with experts *
    experts a token]; -1 for a sample's last token, which it has not computed.  None: not known."""

    @property
    def num_samples(self) -> int:
        return len(self.starts_N)

    @property
    def num_response_tokens(self) -> int:
        return int(self.response_lengths_N.sum())

    def response_slice(self, n: int) -> slice:
        start = int(self.response_lengths_N[:n].sum())
        return slice(start, start + int(self.response_lengths_N[n]))


@dataclass(frozen=True)
class MicroBatch:
    """A few sequences, one after another, as one pipeline micro-batch.

    Padding fills up sequences, and their sum, if context and sequence parallelism want
    multiples; it follows a sequence and counts as part of it, because causal attention never lets a
    token see what comes after.  Two sequences, of which the first is a prompt of 2 and a response
    of 3 tokens, and one position of padding:

        tokens_S   5 6 7 8 9 | 5 6 8 0      lengths_B  5, 4      padding  1
        rows_T     1 2 3     | 6            targets_T  7 8 9 | 8

    `rows_T[i]` says from which position response token i is predicted, `targets_T[i]` which token
    it is, `slots_T[i]` where its values stand in the rollout's packed [T] arrays.  All three are
    empty if a data-parallel rank has nothing left to do: the micro-batch, then of padding alone,
    is run all the same, because pipeline and collectives need every rank.

    Under context parallelism `lengths_B` and `padding` stay those of whole sequences, while the
    tensors are what one rank holds (batching.context_part).
    """

    tokens_S: torch.Tensor
    lengths_B: tuple[int, ...]
    """Positions of each sequence."""
    padding: int
    """How many of these positions are padding."""
    rows_T: torch.Tensor
    targets_T: torch.Tensor
    slots_T: torch.Tensor
    routes: torch.Tensor | None = None
    """As RolloutBatch's, for tokens_S; -1 for padding too."""


@dataclass(frozen=True)
class TokenStats:
    """What the policy says about T response tokens; all [T], fp32, at the sampling temperature.

    `sum_p2` and `sum_p2_logp` are sums over the vocabulary of p^2 and of p^2 ln p: with them the
    exact inner product of policy gradient and entropy gradient is known in logit space
    (METHOD, "token term - baseline term").
    """

    logp_T: torch.Tensor
    entropy_T: torch.Tensor
    sum_p2_T: torch.Tensor
    sum_p2_logp_T: torch.Tensor

    @property
    def device(self) -> torch.device:
        """Asked by megatron-core's schedules of what a mixture of experts returns."""
        return self.logp_T.device


@dataclass(frozen=True)
class TokenStreams:
    """What a loss reads of every response token of a step, besides what the policy says of it.

    All [T], packed as RolloutBatch's response tokens, without gradient, the same on every rank.  A
    new term of the objective is a new field here, and no signature on the way changes.
    """

    old_logp_T: torch.Tensor
    """ln q, where the importance ratio is p/q (train.old_logprobs says whose they are)."""
    rollout_logp_T: torch.Tensor
    """The server's log-probs."""
    advantages_T: torch.Tensor
    """The advantage of the token's sample."""
    weights_T: torch.Tensor
    """Importance weights, at least 0 (algo/correction.py)."""
    sample_T: torch.Tensor
    """Which sample of the rollout it belongs to, int64."""
    lengths_T: torch.Tensor
    """Response tokens of that sample, int64."""
    num_samples: int
    """N of the rollout."""
    reference_logp_T: torch.Tensor | None = None
    """Log-probs of the reference model; None with kl.coef=0."""
    prepared: Mapping[str, torch.Tensor] = field(default_factory=dict)
    """What the loss's `prepare` gave, by name."""

    def map(self, change: Callable[[torch.Tensor], torch.Tensor]) -> TokenStreams:
        """The same with `change` done to every tensor."""
        changed = {
            name: change(value)
            for name, value in vars(self).items()
            if name not in ("num_samples", "prepared") and value is not None
        }
        prepared = {name: change(value) for name, value in self.prepared.items()}
        return replace(self, **changed, prepared=prepared)

    def at(self, slots_T: torch.Tensor | slice) -> TokenStreams:
        """Those of some tokens, by where they stand in the rollout's packed arrays."""
        return self.map(lambda values_T: values_T[slots_T])


@dataclass
class TrainState:
    """What a restart must know besides weights, optimizer and random generators."""

    step: int = 0
    """Finished training steps; the next one is step + 1."""
    sampling: dict[str, Any] = field(default_factory=dict)
    """State of prompts and rollouts (rollout/prefetch.py); on rank 0, and empty before step 1."""
    controller: dict[str, Any] = field(default_factory=dict)
    """State of the clip schedule (OD: s and H_init; empty for the others)."""
    skipped: list[str] = field(default_factory=list)
    """Updates left out so far because loss or gradient was not finite, by the names of their files
    in run_dir/skipped."""
