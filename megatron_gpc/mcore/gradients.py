"""Gradients and weights as vectors that are spread over the ranks, and their inner products."""

from __future__ import annotations

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import param_is_not_tensor_parallel_duplicate
from megatron.core.transformer.module import param_is_not_shared

from megatron_gpc.mcore.policy import Policy
from megatron_gpc.mcore.setup import device

Vector = list[list[torch.Tensor]]
"""Of each of the policy's optimizers this rank's parts; no element is on two ranks of its group."""


def weights(policy: Policy) -> Vector:
    """The optimizers' fp32 weights, or this rank's parts of them, that no other rank holds as well:
    those that megatron-core counts in the gradient's norm."""
    return [
        [
            param
            for param in optimizer.get_parameters()
            if param_is_not_shared(param) and param_is_not_tensor_parallel_duplicate(param)
        ]
        for optimizer in policy.optimizer.chained_optimizers
    ]


def gradient(policy: Policy) -> Vector:
    """A copy of what megatron-core's buffers hold, fp32, where `weights` has the weight."""
    policy.optimizer.prepare_grads()
    return [
        [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in params]
        for params in weights(policy)
    ]


def inner_product(policy: Policy, one: Vector, other: Vector) -> float:
    """<one, other> over all ranks, in float64; a collective, equal on all of them."""
    total = 0.0
    optimizers = policy.optimizer.chained_optimizers
    for optimizer, ones, others in zip(optimizers, one, other, strict=True):
        found = torch.zeros((), dtype=torch.float64, device=device())
        for a, b in zip(ones, others, strict=True):
            found += torch.dot(a.detach().flatten().double(), b.detach().flatten().double())
        dist.all_reduce(found, group=optimizer.get_grad_stats_parallel_group())
        total += float(found)
    return total
