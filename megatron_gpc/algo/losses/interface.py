"""What a loss is given, and what it gives back."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

import torch

from megatron_gpc.types import Bounds, TokenStats, TokenStreams


def _alone(sums: torch.Tensor) -> torch.Tensor:
    return sums


@dataclass(frozen=True)
class LossInputs:
    """Some response tokens of a mini-batch: those of one micro-batch that this rank predicts.

    There may be none.  Which tokens come together depends on the layout, so a loss must be a sum of
    what each token gives; what it needs of a whole sequence comes from `sequence_mean`, what it
    needs of the whole rollout from `PreparedLoss.prepare`.
    """

    logp_T: torch.Tensor
    """ln p of the sampled tokens under the policy being trained; gradient flows here."""
    entropy_T: torch.Tensor
    """Exact entropies; without gradient unless train.entropy_coef asks for it."""
    advantages_T: torch.Tensor
    """How much each token is to be reinforced: its advantage times its importance weight, and 0
    outside clip.regions."""
    bounds: Bounds
    """This training step's clip thresholds."""
    streams: TokenStreams
    """Everything else that is known of these tokens; the advantages there are the plain ones."""
    mini_batch_samples: int
    """Samples of the mini-batch, on all ranks."""
    mini_batch_tokens: int
    """Response tokens of the mini-batch, on all ranks: what the summed loss is divided by."""
    add_over_ranks: Callable[[torch.Tensor], torch.Tensor] = _alone
    """Sum of a tensor over the ranks that hold other tokens of the same sequences (context
    parallelism).  A collective: a loss uses it always or never, also if it has no tokens."""

    def sequence_sum(self, values_T: torch.Tensor) -> torch.Tensor:
        """Each token's sequence's sum of a value over ALL its response tokens [T]; no gradient.

        Added up in float64, so that the layout changes nothing beyond its rounding.  A collective,
        see `add_over_ranks`.
        """
        sample_T = self.streams.sample_T
        here_B = sample_T.unique()
        sums_N = values_T.new_zeros(self.streams.num_samples, dtype=torch.float64)
        # not index_add_, whose order of additions is left to chance on a GPU
        sums_N[here_B] = (here_B[:, None] == sample_T).double() @ values_T.detach().double()
        return self.add_over_ranks(sums_N)[sample_T].to(values_T.dtype)

    def sequence_mean(self, values_T: torch.Tensor) -> torch.Tensor:
        """`sequence_sum` divided by the sequence's number of response tokens."""
        return self.sequence_sum(values_T) / self.streams.lengths_T

    @property
    def sequence_weight_T(self) -> torch.Tensor:
        """What to multiply each token's loss by for every sequence to weigh the same.

        The summed loss is divided by the mini-batch's tokens, so that tokens weigh the same; with
        these weights it becomes the mean over sequences of their tokens' mean.
        """
        return self.mini_batch_tokens / max(1, self.mini_batch_samples) / self.streams.lengths_T


@dataclass(frozen=True)
class LossOutputs:
    """A sum over tokens, and what each token did.  Only the sum has a gradient."""

    loss_sum: torch.Tensor
    """Scalar; the caller divides by the GLOBAL number of response tokens, once."""
    ratio_T: torch.Tensor
    """The importance ratio that the loss bounds."""
    clipped_low_T: torch.Tensor
    """Tokens that the lower bound acted on, bool.  With the default loss those whose gradient it
    took: A < 0 and ratio below it."""
    clipped_high_T: torch.Tensor
    """Tokens that the upper bound acted on, bool.  With the default loss those whose gradient it
    took: A > 0 and ratio above it."""
    metrics: Mapping[str, torch.Tensor] = field(default_factory=dict)
    """Further values of each token [T]; the mean over all tokens is logged as `loss_NAME`.  The
    names are always the same."""


class Loss(Protocol):
    """The objective, with its sign turned, of some tokens."""

    def __call__(self, inputs: LossInputs) -> LossOutputs:
        """Called once for every micro-batch; on the ranks that hold it, in the same order."""
        ...


class PreparedLoss(Loss, Protocol):
    """A loss that looks at the whole rollout before a step's updates."""

    def prepare(
        self, streams: TokenStreams, scored: TokenStats, step: int, seed: int
    ) -> Mapping[str, torch.Tensor]:
        """Values of every response token [T], by name; they arrive as `inputs.streams.prepared`.

        Called once a training step on every rank with the same values, and has to give the same:
        what it draws depends on `seed` and `step` alone.

        Args:
            streams: of the whole rollout, on the CPU.
            scored: what the policy says of these tokens before the step's first update.
            step: number of the training step, from 1.
            seed: of the run.
        """
        ...
