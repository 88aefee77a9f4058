"""A loss is called on a made-up example before a run begins, and refused if it would fail."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from megatron_gpc.algo.clipping import affine_bounds
from megatron_gpc.algo.losses.interface import LossInputs, LossOutputs
from megatron_gpc.config.parts import describe, wanted
from megatron_gpc.errors import UserError
from megatron_gpc.types import LARGEST, TokenStats, TokenStreams

LENGTHS = torch.tensor([4, 1, 7, 2])
"""Response tokens of the example's samples."""


def try_out(name: str, loss: Any, reference: bool) -> LossOutputs:
    """What a loss gives for the example.

    Args:
        name: of the loss, for messages.
        reference: whether there are log-probs of a reference model.

    Raises:
        UserError: it fails, does not give LossOutputs of the right shapes, gives no finite loss and
            gradient, fails without tokens, or its loss is no sum over sequences.
    """
    inputs = made_up(reference)
    try:
        if hasattr(loss, "prepare"):
            scored = TokenStats(inputs.logp_T.detach(), *inputs.entropy_T.expand(3, -1))
            streams = prepared_streams(loss, inputs.streams, scored, 1, 0)
            inputs = replace(inputs, streams=streams)
        outputs, loss_sum = _called(loss, inputs)
        first_T = inputs.streams.sample_T < 2
        cut = sum(_called(loss, part(inputs, held_T))[1] for held_T in (first_T, ~first_T))
        if abs(loss_sum - cut) > 1e-4 * (1 + abs(loss_sum)):
            raise ValueError(
                f"the loss of four sequences is {loss_sum:.6g}, that of the first two and the last "
                f"two together {cut:.6g}; loss_sum has to be a sum over tokens, not a mean: it is "
                "divided by the number of all tokens later"
            )
        _called(loss, part(inputs, torch.zeros_like(inputs.logp_T, dtype=torch.bool)))
    except (Exception, SystemExit) as error:
        raise UserError(
            f"train.loss: {name} failed on a made-up example: {describe(error)}"
            f"{wanted('train.loss', name)}"
        ) from error
    return outputs


def prepared_streams(
    loss: Any, streams: TokenStreams, scored: TokenStats, step: int, seed: int
) -> TokenStreams:
    """The streams with what the loss's `prepare` gave; its arguments are PreparedLoss's.

    Raises:
        ValueError: it gave no mapping of names to tensors [T].
    """
    prepared = loss.prepare(streams, scored, step, seed)
    if not isinstance(prepared, Mapping):
        raise ValueError(f"prepare() returned {type(prepared).__name__}, expected a mapping")
    for name, values_T in prepared.items():
        _check_values(f"prepare()[{name!r}]", values_T, len(streams.old_logp_T))
    return replace(streams, prepared=prepared)


def made_up(reference: bool) -> LossInputs:
    """A mini-batch of sequences with advantages of both signs and ratios around 1."""
    draw = torch.Generator().manual_seed(0)
    sample_T = torch.arange(len(LENGTHS)).repeat_interleave(LENGTHS)
    tokens = len(sample_T)
    old_logp_T = -3 * torch.rand(tokens, generator=draw) - 0.5
    logp_T = old_logp_T + 0.4 * torch.randn(tokens, generator=draw).clamp(max=1)
    streams = TokenStreams(
        old_logp_T=old_logp_T,
        rollout_logp_T=old_logp_T.clone(),
        advantages_T=torch.tensor([1.0, -1.0, 0.5, 0.0])[sample_T],
        weights_T=torch.ones(tokens),
        sample_T=sample_T,
        lengths_T=LENGTHS[sample_T],
        num_samples=len(LENGTHS),
        reference_logp_T=old_logp_T - 0.1 if reference else None,
    )
    return LossInputs(
        logp_T=logp_T.requires_grad_(),
        entropy_T=torch.rand(tokens, generator=draw),
        advantages_T=streams.advantages_T,
        bounds=affine_bounds((-0.25, 0.5), (0.0, 0.2)),
        streams=streams,
        mini_batch_samples=len(LENGTHS),
        mini_batch_tokens=tokens,
    )


def part(inputs: LossInputs, held_T: torch.Tensor) -> LossInputs:
    """Some tokens of an example, as a micro-batch of the same mini-batch."""
    return replace(
        inputs,
        logp_T=inputs.logp_T.detach()[held_T].requires_grad_(),
        entropy_T=inputs.entropy_T[held_T],
        advantages_T=inputs.advantages_T[held_T],
        streams=inputs.streams.at(held_T),
    )


def check_outputs(outputs: Any, tokens: int) -> None:
    """Hold what a loss gave for some tokens to LossOutputs, by shapes and types alone.

    Raises:
        ValueError: says what it is instead.
    """
    if not isinstance(outputs, LossOutputs):
        raise ValueError(f"it returned {type(outputs).__name__}, expected LossOutputs")
    what, loss_sum = f"for {tokens} tokens loss_sum", outputs.loss_sum
    if not isinstance(loss_sum, torch.Tensor) or loss_sum.shape != ():
        raise ValueError(f"{what} is {loss_sum!r}, expected a tensor of one value")
    if not loss_sum.requires_grad:
        raise ValueError(f"{what} has no gradient; it has to depend on inputs.logp_T")
    flags = ("clipped_low_T", "clipped_high_T")
    for name in ("ratio_T", *flags):
        _check_values(name, getattr(outputs, name), tokens, name in flags)
    for name, values_T in outputs.metrics.items():
        _check_values(f"metrics[{name!r}]", values_T, tokens)


def _called(loss: Any, inputs: LossInputs) -> tuple[LossOutputs, float]:
    """Outputs and the loss; ValueError if they cannot be trained with."""
    tokens, given_T = len(inputs.logp_T), inputs.advantages_T.clone()
    outputs = loss(inputs)
    check_outputs(outputs, tokens)
    if not torch.equal(inputs.advantages_T, given_T):
        raise ValueError("it changed inputs.advantages_T in place; work on a copy")
    what = f"for {tokens} tokens"
    (grad_T,) = torch.autograd.grad(outputs.loss_sum, inputs.logp_T, allow_unused=True)
    if grad_T is None:
        raise ValueError(f"{what} loss_sum does not depend on inputs.logp_T")
    for name, values in {"loss_sum": outputs.loss_sum, "its gradient": grad_T}.items():
        _check_size(f"{what} {name}", values)
    _check_size(f"{what} ratio_T", outputs.ratio_T)
    return outputs, float(outputs.loss_sum.detach())


def _check_size(name: str, values: torch.Tensor) -> None:
    if not (values.detach().abs() <= LARGEST).all():
        raise ValueError(f"{name} is not finite, or beyond {LARGEST:g}")


def _check_values(name: str, values_T: Any, tokens: int, flags: bool = False) -> None:
    found = type(values_T).__name__
    if isinstance(values_T, torch.Tensor):
        found = f"{values_T.dtype} {list(values_T.shape)}"
        if values_T.shape == (tokens,) and not (flags and values_T.dtype is not torch.bool):
            return
    kind = "bool " if flags else ""
    raise ValueError(f"{name} is {found}, expected a {kind}tensor of shape [{tokens}]")
