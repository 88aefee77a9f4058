"""Means and maxima over all tokens of a training step, whichever rank or micro-batch held them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist

Scalar = torch.Tensor | float


class Sums:
    """Numerators and denominators, kept apart until everything has been added up.

    A mean of means is wrong as soon as the parts differ in size.  Two micro-batches, one with 1
    clipped token of 1, one with 0 of 99: the clip fraction is 1 %, the mean of their fractions
    50 %.  How responses fall into micro-batches is chance and layout, so such a metric would change
    with either.  Here only sums are added, and one place divides: `reduce`.

    `add` and `add_max` never read a value back, so they cost a GPU no synchronisation.

    >>> sums = Sums(["clip_fraction_high"], ["ratio_max"])
    >>> sums.add("clip_fraction_high", clipped_T.sum(), clipped_T.numel())
    >>> sums.add_max("ratio_max", ratio_T.max())
    >>> sums.reduce()
    {'clip_fraction_high': 0.01, 'ratio_max': 1.37}

    Args:
        mean_names: metrics that are numerator / denominator.
        max_names: metrics that are maxima.
        device: where sums are kept; one that the default process group can communicate from.

    Names and their order must be the same on every rank.
    """

    def __init__(
        self,
        mean_names: Sequence[str],
        max_names: Sequence[str] = (),
        device: torch.device | str = "cpu",
    ):
        self._mean_row = {name: row for row, name in enumerate(mean_names)}
        self._max_row = {name: row for row, name in enumerate(max_names)}
        assert len(self._mean_row) == len(mean_names) and len(self._max_row) == len(max_names)
        assert not self._mean_row.keys() & self._max_row.keys(), "one name, one meaning"
        # float64: a step adds up millions of tokens, and 1e7 + 1 is no longer exact in fp32.
        self._pairs = torch.zeros(len(mean_names), 2, dtype=torch.float64, device=device)
        self._maxima = torch.full((len(max_names),), -torch.inf, dtype=torch.float64, device=device)

    def add(self, name: str, numerator: Scalar, denominator: Scalar) -> None:
        """Add a sum over some tokens (or samples, updates) and how many of them there were.

        Both are Python numbers or tensors of one element; gradients are not followed.
        """
        pair = self._pairs[self._mean_row[name]]
        pair[0] += _detached(numerator)
        pair[1] += _detached(denominator)

    def add_each(
        self, names: Sequence[str], numerators: torch.Tensor, denominators: torch.Tensor
    ) -> None:
        """`add` for several metrics at once, as one operation.

        Args:
            names: K metrics.
            numerators, denominators: K values each, or one for all.
        """
        rows = [self._mean_row[name] for name in names]
        pairs = torch.stack(torch.broadcast_tensors(numerators, denominators), -1).detach()
        self._pairs[rows] += pairs.double()

    def add_max(self, name: str, value: Scalar) -> None:
        """Raise the maximum `name` to `value` if that is larger."""
        row = self._max_row[name]
        value = torch.as_tensor(_detached(value), dtype=torch.float64, device=self._maxima.device)
        self._maxima[row] = torch.maximum(self._maxima[row], value)

    def reduce(self) -> dict[str, float]:
        """Every mean and maximum over all ranks, equal on all of them.

        Two collectives, however many names there are, and every rank must enter them.
        Ranks that see no logits (pipeline stages before the last) have added nothing: zeros, and
        -inf for maxima.  Ranks that hold copies of the same tokens (tensor parallel) may all have
        added them: numerator and denominator are then multiplied alike.

        What was added stays as it is.  A metric to which no rank added anything is nan.
        """
        pairs, maxima = self._pairs.clone(), self._maxima.clone()
        dist.all_reduce(pairs, op=dist.ReduceOp.SUM)
        dist.all_reduce(maxima, op=dist.ReduceOp.MAX)
        means = (pairs[:, 0] / pairs[:, 1]).tolist()  # 0 / 0 is nan
        maxima = torch.where(maxima == -torch.inf, torch.nan, maxima).tolist()
        return dict(zip(self._mean_row, means, strict=True)) | dict(
            zip(self._max_row, maxima, strict=True)
        )


def _detached(value: Scalar) -> Scalar:
    """A number as it is, a tensor of one element as a scalar outside the autograd graph."""
    return value.detach().reshape(()) if isinstance(value, torch.Tensor) else value
