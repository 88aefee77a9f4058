"""What the ranks of a pool do in these tests; every function runs on all ranks at once."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from tiny import plain_streams
from torch.nn.attention import SDPBackend, sdpa_kernel

from megatron_gpc.config import Config
from megatron_gpc.types import Bounds, RolloutBatch


@contextmanager
def groups(config: Config) -> Iterator[None]:
    """megatron-core's groups of a layout, left again at the end."""
    from megatron.core import parallel_state

    from megatron_gpc.mcore.setup import initialize_model_parallel

    initialize_model_parallel(config)
    try:
        yield
    finally:
        parallel_state.destroy_model_parallel()


def start(config: Config) -> tuple[Any, Any]:
    """A Policy with the weights of model.hf, and the model's table."""
    from megatron_gpc.mcore.policy import Policy
    from megatron_gpc.mcore.weights import load_hf
    from megatron_gpc.weights import family_of
    from megatron_gpc.weights.folders import read_hf_config

    hf = read_hf_config(config.model.hf)
    family = family_of(hf)
    params = family.params(hf, config.parallel.tp)
    policy = Policy(config, family.model_fields(hf))
    load_hf(policy.models, params, config.model.hf, family.copies(hf))
    policy.weights_changed()
    return policy, params


@contextmanager
def policy_of(config: Config) -> Iterator[tuple[Any, Any]]:
    """`start` at the configured layout."""
    with groups(config):
        yield start(config)


def gather(policy: Any, params: Any, values: Any) -> dict[str, torch.Tensor]:
    """Whole tensors by canonical name from every rank's parts; values(parameter) -> tensor."""
    from megatron_gpc.mcore.weights import named_shards
    from megatron_gpc.weights import unshard

    mine = {
        name: (part, parts, values(parameter).detach().cpu().clone())
        for name, (parameter, part, parts) in named_shards(policy.models).items()
    }
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    whole = {}
    for param in params:
        held: dict[int, torch.Tensor] = {}
        for one in everyone:
            if param.megatron in one:
                part, _, tensor = one[param.megatron]
                held.setdefault(part, tensor)
        whole[param.megatron] = unshard(param, [held[i] for i in sorted(held)])
    return whole


def score_and_update(
    config: Config,
    problems: dict[str, tuple[Path, RolloutBatch]],
    bounds: Bounds,
    samples: list[int] | None = None,
) -> dict[str, dict[str, Any]]:
    """Name -> scores, clip decisions, metrics and (on rank 0) weights, whole, around one update.

    Args:
        problems: name -> Hugging Face folder, rollout; all run at the layout of `config`.
        samples: of the mini-batch; everything unless some are named.
    """
    with groups(config):
        return {
            name: _score_and_update(
                replace(config, model=replace(config.model, hf=hf)), batch, bounds, samples
            )
            for name, (hf, batch) in problems.items()
        }


def score_and_update_in_reverse(*arguments: Any) -> dict[str, dict[str, Any]]:
    """`score_and_update` with the last micro-batch first."""
    from unittest.mock import patch

    from megatron_gpc.mcore import policy

    real = policy.micro_batches
    with patch.object(policy, "micro_batches", lambda *args, **kw: real(*args, **kw)[::-1]):
        return score_and_update(*arguments)


def _score_and_update(
    config: Config, batch: RolloutBatch, bounds: Bounds, samples: list[int] | None
) -> dict[str, Any]:
    from megatron_gpc.mcore.policy import UPDATE_MAXIMA
    from megatron_gpc.mcore.setup import device
    from megatron_gpc.metrics.reduce import Sums

    policy, params = start(config)
    scored = policy.score(batch)
    samples = list(range(batch.num_samples)) if samples is None else samples
    reference_logp_T = reference_of(config, policy).score(batch) if config.kl.coef else None
    streams = replace(plain_streams(batch), reference_logp_T=reference_logp_T)
    if policy.objective.prepares:
        streams = policy.objective.prepare(streams, scored, 1, config.seed)
    given = (batch, samples, streams, bounds)
    calls = count_attention(policy)
    # slot of a response token -> (clipped below, clipped above), for the tokens of this rank
    clipped = {}
    for micro, loss, _ in policy.gradient(*given):
        flags = zip(loss.clipped_low_T.tolist(), loss.clipped_high_T.tolist(), strict=True)
        clipped.update(zip(micro.slots_T.tolist(), flags, strict=True))
    attention_calls = len(calls)
    before = gather(policy, params, lambda p: p)
    sums = Sums(policy.update_means, UPDATE_MAXIMA, device())
    updated = policy.update(*given, sums)
    after = gather(policy, params, lambda p: p)
    found = {"scored": scored, "clipped": clipped, "attention_calls": attention_calls}
    found |= {**sums.reduce(), **updated}
    return found | ({"before": before, "after": after} if dist.get_rank() == 0 else {})


def reference_of(config: Config, policy: Any) -> Any:
    """The reference model of the configuration."""
    from megatron_gpc.mcore.checkpoint.load import load_folder
    from megatron_gpc.mcore.reference import Reference

    folder = config.kl.reference or config.model.hf
    return Reference(policy, lambda: load_folder(policy, folder))


def entropy_change(
    config: Config, batch: RolloutBatch, bounds: Bounds, measured: bool
) -> dict[str, Any]:
    """EntropyChange's metrics over two updates, and (on rank 0) Hugging Face weights around them.

    Args:
        measured: False: the same updates without it, and without the signal's share before them.
    """
    from megatron_gpc.mcore.entropy_change import EntropyChange
    from megatron_gpc.mcore.policy import UPDATE_MAXIMA, UPDATE_MEANS
    from megatron_gpc.mcore.setup import device
    from megatron_gpc.mcore.signal_share import signal_share
    from megatron_gpc.mcore.weights import Exporter
    from megatron_gpc.metrics.reduce import Sums

    with policy_of(config) as (policy, params):
        scored = policy.score(batch)
        before = {n: t.clone() for n, t in Exporter(policy.models, params).tensors()}
        if measured:
            signal_share(policy, batch, plain_streams(batch), bounds)
        change = EntropyChange(policy, batch, scored) if measured else None
        half = batch.num_samples // 2
        for samples in (list(range(half)), list(range(half, batch.num_samples))):
            policy.update(
                batch,
                samples,
                plain_streams(batch),
                bounds,
                Sums(UPDATE_MEANS, UPDATE_MAXIMA, device()),
            )
        after = {n: t.clone() for n, t in Exporter(policy.models, params).tensors()}
        return {
            "before": before,
            "after": after,
            "metrics": change.metrics() if change else {},
        }


def signal(
    config: Config,
    problems: dict[str, tuple[Path, RolloutBatch]],
    bounds: Bounds,
    samples: list[int] | None,
) -> dict[str, float]:
    """Name -> signal_share; arguments as of `score_and_update`, `samples` unused."""
    from megatron_gpc.mcore.signal_share import signal_share

    with groups(config):
        found = {}
        for name, (hf, batch) in problems.items():
            policy, _ = start(replace(config, model=replace(config.model, hf=hf)))
            found[name] = signal_share(policy, batch, plain_streams(batch), bounds)
        return found


def count_attention(policy: Any) -> list[None]:
    """A list that grows by one whenever a layer's attention is computed."""
    from megatron_gpc.mcore.attention import PackedAttention

    calls: list[None] = []
    for model in policy.models:
        for module in model.modules():
            if isinstance(module, PackedAttention):
                module.register_forward_hook(lambda *unused: calls.append(None))
    return calls


def export(config: Config) -> dict[str, torch.Tensor]:
    """The policy's weights as Hugging Face tensors (on rank 0)."""
    from megatron_gpc.mcore.weights import Exporter

    with policy_of(config) as (policy, params):
        return dict(Exporter(policy.models, params, bucket_bytes=10_000).tensors())


def _local(logits_TV: torch.Tensor) -> torch.Tensor:
    return logits_TV.chunk(dist.get_world_size(), dim=1)[dist.get_rank()].clone()


def token_stats_of(
    given: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    vocab_size: int,
    temperature: float,
    chunk_tokens: int,
    entropy_grad: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """([4, T] values, this rank's gradient of a weighted sum of log-prob and entropy)."""
    from megatron_gpc.kernels.vocab_parallel import token_stats

    logits_TV, targets_T, weights_2T = given
    local_TV = _local(logits_TV).requires_grad_()
    stats = token_stats(
        local_TV,
        targets_T,
        vocab_size=vocab_size,
        group=dist.group.WORLD,
        temperature=temperature,
        chunk_tokens=chunk_tokens,
        entropy_grad=entropy_grad,
    )
    assert stats.entropy_T.requires_grad == entropy_grad
    loss = (stats.logp_T * weights_2T[0]).sum()
    if entropy_grad:
        loss = loss + (stats.entropy_T * weights_2T[1]).sum()
    loss.backward()
    values = [stats.logp_T, stats.entropy_T, stats.sum_p2_T, stats.sum_p2_logp_T]
    return torch.stack(values).detach(), local_TV.grad


def collectives_of_token_stats(given: Any, vocab_size: int) -> tuple[list[str], list[int], bool]:
    """Names and input sizes of all collectives of a forward and backward pass; logits unchanged?"""
    from unittest.mock import patch

    from megatron_gpc.kernels.vocab_parallel import token_stats

    local_TV = _local(given[0]).requires_grad_()
    before_TV = local_TV.detach().clone()
    calls, sizes = [], []
    with contextlib.ExitStack() as stack:
        for name in (
            "all_gather_into_tensor",
            "all_gather",
            "all_reduce",
            "broadcast",
            "reduce_scatter_tensor",
            "all_to_all_single",
        ):
            real = getattr(dist, name)

            def spy(*args: Any, name: str = name, real: Any = real, **kwargs: Any) -> Any:
                calls.append(name)
                sizes.append(
                    args[1].numel() if name == "all_gather_into_tensor" else args[0].numel()
                )
                return real(*args, **kwargs)

            stack.enter_context(patch.object(dist, name, spy))
        stats = token_stats(
            local_TV, given[1], vocab_size=vocab_size, group=dist.group.WORLD, entropy_grad=True
        )
        (stats.logp_T + stats.entropy_T).sum().backward()
    return calls, sizes, torch.equal(local_TV.detach(), before_TV)


def collectives_of_update(
    config: Config, hf: Path, batch: RolloutBatch, bounds: Bounds
) -> set[str]:
    """Names of the process groups' operations that scoring and an update take."""
    from megatron_gpc.mcore.policy import UPDATE_MAXIMA
    from megatron_gpc.mcore.setup import device
    from megatron_gpc.metrics.reduce import Sums

    with policy_of(replace(config, model=replace(config.model, hf=hf))) as (policy, _):
        sums, samples = (
            Sums(policy.update_means, UPDATE_MAXIMA, device()),
            list(range(batch.num_samples)),
        )
        with torch.profiler.profile() as profile:
            policy.score(batch)
            policy.update(batch, samples, plain_streams(batch), bounds, sums)
    names = (event.key for event in profile.key_averages())
    return {name for name in names if name.startswith("c10d::")}


def saved_sizes_of_token_stats(given: Any, vocab_size: int, entropy_grad: bool) -> list[int]:
    """Elements of every tensor that is kept for backward."""
    from megatron_gpc.kernels.vocab_parallel import token_stats

    saved: list[int] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        saved.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        token_stats(
            given[0].requires_grad_(), given[1], vocab_size=vocab_size, entropy_grad=entropy_grad
        )
    return saved


def after_updates(
    config: Config,
    batches: list[RolloutBatch],
    bounds: Bounds,
    offload: bool = False,
    reference: bool = False,
) -> dict[str, Any]:
    """What an update on each of the batches returned, and everything that they left behind.

    Args:
        offload: whether the training state is away before each update, while the batch is scored.
        reference: whether a reference model scores each batch too; its log-probs are not used.
    """
    from megatron_gpc.mcore.offload import Offload
    from megatron_gpc.mcore.policy import UPDATE_MAXIMA, UPDATE_MEANS
    from megatron_gpc.mcore.setup import device
    from megatron_gpc.metrics.reduce import Sums

    # The other kernels' gradients are not the same bits every time on a GPU.
    with sdpa_kernel(SDPBackend.MATH), policy_of(config) as (policy, params):
        sums, away = Sums(UPDATE_MEANS, UPDATE_MAXIMA, device()), Offload(policy)
        updates, freed, scores, references = [], [], [], []
        other = reference_of(config, policy) if reference else None
        for batch in batches:
            if offload:
                before = held_bytes(policy)
                away.to_host()
                freed.append(before - held_bytes(policy))
            scores.append(policy.score(batch).logp_T)
            away.to_device()
            if other is not None:
                references.append(other.score(batch))
            updates.append(
                policy.update(
                    batch,
                    list(range(batch.num_samples)),
                    plain_streams(batch),
                    bounds,
                    sums,
                )
            )
        return {
            "updates": updates,
            "freed": freed,
            "scores": scores,
            "references": references,
            "metrics": sums.reduce(),
            "weights": [p.detach().cpu().clone() for m in policy.models for p in m.parameters()],
            "moments": [
                value.cpu().clone()
                for optimizer in policy.optimizer.chained_optimizers
                for state in optimizer.optimizer.state.values()
                for name, value in sorted(state.items())
            ],
            "scheduler": policy.scheduler.state_dict(),
        }


def held_bytes(policy: Any) -> int:
    """Bytes of the policy's optimizer state, fp32 weights and gradients.

    Of storages, because what is offloaded leaves its tensors their shapes.  On a GPU what torch
    has allocated there, which those of a policy are.
    """
    if torch.cuda.is_available():
        return torch.cuda.memory_allocated()
    tensors = [buffer.grad_data for chunk in policy.chunks for buffer in chunk.buffers]
    for optimizer in policy.optimizer.chained_optimizers:
        tensors += [p for group in optimizer.optimizer.param_groups for p in group["params"]]
        tensors += [t for s in optimizer.optimizer.state.values() for t in s.values()]
    storages = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())
