"""The objectives: `clip`, the default, and others under the same interface, each a file of its own.

A loss is a function of LossInputs, or a class (or function) that the configuration's arguments are
passed to and whose objects are such functions; docs/extend.md shows how to write one.
"""

from __future__ import annotations

import inspect
from dataclasses import replace
from functools import partial
from typing import Any

from pydantic import ValidationError

from megatron_gpc.algo.losses.check import check_outputs, prepared_streams, try_out
from megatron_gpc.algo.losses.cispo import CISPO
from megatron_gpc.algo.losses.clip import clip
from megatron_gpc.algo.losses.clip_cov import ClipCov
from megatron_gpc.algo.losses.gspo import GSPO
from megatron_gpc.algo.losses.interface import Loss, LossInputs, LossOutputs, PreparedLoss
from megatron_gpc.config import Config, parts
from megatron_gpc.errors import PartError, UserError
from megatron_gpc.types import TokenStats, TokenStreams

LOSSES: dict[str, Any] = {
    "clip": clip,
    "gspo": GSPO,
    "cispo": CISPO,
    "clip-cov": ClipCov,
}
LOSS_KEY = "train.loss"


class Objective:
    """The loss that the configuration names, built-in or the user's own; errors of it name it.

    It is called on a made-up example first.

    Raises:
        UserError: it cannot be imported or called, or what it gives is no LossOutputs that can be
            trained with.
    """

    metrics: tuple[str, ...]
    """Names of what is logged of its outputs' `metrics`."""

    def __init__(self, config: Config):
        self.name = config.train.loss
        self.loss = _make(self.name, config.train.loss_arguments)
        example = try_out(self.name, self.loss, config.kl.coef > 0)
        self.metrics = tuple(f"loss_{name}" for name in example.metrics)

    def __call__(self, inputs: LossInputs) -> LossOutputs:
        """What the loss gives; `metrics` under the names that they are logged by."""
        with parts.blamed(LOSS_KEY, self.name, f"a micro-batch of {len(inputs.logp_T)} tokens"):
            outputs = self.loss(inputs)
            check_outputs(outputs, len(inputs.logp_T))
        named = {f"loss_{name}": values_T.detach() for name, values_T in outputs.metrics.items()}
        if set(named) != set(self.metrics):
            raise PartError(
                f"{LOSS_KEY}: {self.name} gave the metrics {sorted(outputs.metrics)}, and other "
                "ones when it was called first; give the same names in every call"
            )
        return replace(outputs, ratio_T=outputs.ratio_T.detach(), metrics=named)

    @property
    def prepares(self) -> bool:
        """Whether the loss wants to see the whole rollout before a step's updates."""
        return hasattr(self.loss, "prepare")

    def prepare(
        self, streams: TokenStreams, scored: TokenStats, step: int, seed: int
    ) -> TokenStreams:
        """The streams, with what the loss computes from the whole rollout; for the arguments see
        `PreparedLoss.prepare`."""
        nothing = not len(streams.old_logp_T)  # no loss has to reckon with an empty step
        if nothing or not hasattr(self.loss, "prepare"):
            return streams
        with parts.blamed(LOSS_KEY, self.name, f"prepare() of step {step}"):
            return prepared_streams(self.loss, streams, scored, step, seed)


def _make(name: str, arguments: dict[str, Any]) -> Any:
    found: Any = parts.find(LOSS_KEY, name, LOSSES)
    first = None if inspect.isclass(found) else next(iter(_parameters(found)), None)
    if first == "inputs":
        parts.check_call(LOSS_KEY, name, found, ("inputs",), arguments)
        return partial(found, **arguments) if arguments else found
    hint = f"; if it is the loss itself, call its first parameter `inputs`, not `{first}`"
    hint = hint if first else ""
    for argument, value in arguments.items():
        if name in LOSSES and isinstance(value, bool):  # pydantic takes it for 1
            raise UserError(f"{LOSS_KEY}_arguments.{argument}: is no switch, got {value}")
    try:
        parts.check_call(LOSS_KEY, name, found, (), arguments)
        made = found(**arguments)
    except UserError as error:
        raise UserError(f"{error}{hint}") from None
    except ValidationError as error:
        raise UserError(
            "; ".join(
                f"{LOSS_KEY}_arguments.{'.'.join(map(str, problem['loc']))}: {problem['msg']}, got "
                f"{problem['input']!r}"
                for problem in error.errors()
            )
        ) from None
    except (Exception, SystemExit) as error:
        raise UserError(
            f"{LOSS_KEY}: {name} cannot be made of {LOSS_KEY}_arguments: {parts.describe(error)}"
            f"{parts.wanted(LOSS_KEY, name)}{hint}"
        ) from error
    if not callable(made):
        raise UserError(
            f"{LOSS_KEY}: {name} made {type(made).__name__}, which cannot be called"
            f"{parts.wanted(LOSS_KEY, name)}{hint}"
        )
    return made


def _parameters(found: Any) -> tuple[str, ...]:
    try:
        return tuple(inspect.signature(found).parameters)
    except (TypeError, ValueError):  # written in C, and silent about its parameters
        return ()
