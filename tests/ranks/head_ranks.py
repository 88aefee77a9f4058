"""What a rank of a pool does in the tests of the head."""

from __future__ import annotations

import contextlib
import importlib
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist


def head_stats_of(
    given: tuple[torch.Tensor, ...], options: dict[str, Any], rows: str, main_grad: bool = False
) -> dict[str, Any]:
    """Values, gradients and collectives of one forward and backward pass over this rank's shard.

    Args:
        given: hidden [T, D], weight [V, D], targets [T], weights [2, T] of log-prob and entropy.
        options: of `head_stats`.
        rows: the module of megatron_gpc.kernels that goes over the logits.
        main_grad: whether the weight has one, which holds ones already.
    """
    from megatron_gpc.kernels.head import head_stats

    back_end = importlib.import_module(f"megatron_gpc.kernels.{rows}")
    if rows == "rows_triton":
        back_end.BLOCK = 64  # so that a chunk has several
    hidden_TD, weight_VD, targets_T, weights_2T = given
    hidden_TD = hidden_TD.clone().requires_grad_()
    weight_VD = weight_VD.chunk(dist.get_world_size())[dist.get_rank()].clone().requires_grad_()
    if main_grad:
        weight_VD.main_grad = torch.ones_like(weight_VD, dtype=torch.float32)  # pyright: ignore
    with _collectives() as calls:
        stats = head_stats(
            *(hidden_TD, weight_VD, targets_T),
            **options,
            group=dist.group.WORLD,
            rows=back_end,
        )
        assert stats.entropy_T.requires_grad == options["entropy_grad"]
        loss = (stats.logp_T * weights_2T[0]).sum()
        if options["entropy_grad"]:
            loss = loss + (stats.entropy_T * weights_2T[1]).sum()
        loss.backward()
    values = [stats.logp_T, stats.entropy_T, stats.sum_p2_T, stats.sum_p2_logp_T]
    return {
        "values": torch.stack(values).detach(),
        "hidden": hidden_TD.grad,
        "weight": weight_VD.main_grad - 1 if main_grad else weight_VD.grad,
        "added": getattr(weight_VD, "grad_added_to_main_grad", False),
        "calls": calls,
    }


@contextlib.contextmanager
def _collectives() -> Any:
    """(name, elements that this rank gives) of every collective of the block."""
    calls: list[tuple[str, int]] = []
    with contextlib.ExitStack() as stack:
        for name in (
            *("all_gather_into_tensor", "all_gather", "all_reduce", "broadcast"),
            *("reduce_scatter_tensor", "all_to_all_single"),
        ):
            real = getattr(dist, name)

            def spy(*args: Any, name: str = name, real: Any = real, **kwargs: Any) -> Any:
                given = args[1] if name == "all_gather_into_tensor" else args[0]
                calls.append((name, given.numel()))
                return real(*args, **kwargs)

            stack.enter_context(patch.object(dist, name, spy))
        yield calls
