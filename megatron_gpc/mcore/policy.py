"""The policy: score tokens, update weights.

How a gradient is scaled, from one token to the optimizer (megatron-core with
calculate_per_token_loss=True):

1. A micro-batch's loss is a SUM over the response tokens that this rank predicts
   (algo/losses).  A token has its row on exactly one data- and context-parallel rank
   (batching.py).
2. pipeline_parallel/schedules.py leaves the sum undivided; gradients of micro-batches add up in
   DDP's buffer.  Between stages gradients of activations travel as they are.
3. A token's loss also depends on keys and values that other context-parallel ranks computed.
   Attention gathers them, and the way back sums over the ranks (mcore/attention.py), so that a
   rank's buffer has what its own positions contribute to the loss of ALL tokens.  A position stands
   on one rank, so nothing is counted twice.
4. Tensor-parallel ranks compute the same loss, each on its part of the vocabulary; the log-prob's
   one collective (kernels/merging.py) gives each the gradient of its own logits, and the
   layers' all-reduces, or with sequence parallelism reduce-scatters, make activations' gradients
   whole.  Weights that are not cut but see a part of the sequence (norms) are summed over the
   tensor-parallel ranks by finalize_model_grads.
5. DDP's gradient_scaling_factor is 1, so reducing over data- and context-parallel ranks sums; for
   experts, over the ranks that hold the same ones.
6. `_finalize` divides every gradient by the number of response tokens of the mini-batch,
   which every rank knows: THE one division.  So

       grad = sum over micro-batches, DP and CP of d loss_sum / global number of response tokens

   whatever the layout, and a rank or micro-batch without response tokens adds 0 to both.

tests/ranks/test_layouts.py holds every layout to a float64 gradient of the loss in one process.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, finalize_model_grads
from megatron.core.optimizer import get_megatron_optimizer
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer.module import Float16Module

from megatron_gpc.algo.kl import k3
from megatron_gpc.algo.losses import LossInputs, LossOutputs, Objective
from megatron_gpc.algo.regions import REGIONS, RegionSums, keep_regions, region_masks, region_sums
from megatron_gpc.batching import context_part, micro_batches, multiples
from megatron_gpc.config import Config
from megatron_gpc.mcore.model import build_model
from megatron_gpc.mcore.native import ddp_config, optimizer_config
from megatron_gpc.mcore.routing import RoutingReplay
from megatron_gpc.mcore.setup import device, from_main, sum_over_ranks
from megatron_gpc.metrics.reduce import Sums
from megatron_gpc.types import Bounds, MicroBatch, RolloutBatch, TokenStats, TokenStreams
from megatron_gpc.weights import ModelFields, family_of
from megatron_gpc.weights.folders import read_hf_config

CLIP_FRACTIONS, GRADIENT_SHARES, DH_PREDICTED = (
    [f"{name}_{region}" for region in REGIONS]
    for name in ("clip_fraction", "gradient_share", "dh_predicted")
)
UPDATE_MEANS = (
    *("loss", "ratio_mean", "clip_fraction_low", "clip_fraction_high", "padding_fraction"),
    *(*CLIP_FRACTIONS, *GRADIENT_SHARES, *DH_PREDICTED, "dh_predicted"),
)
UPDATE_MAXIMA = ("ratio_max",)
ROUTING_CHANGED = "routing_changed"
"""The mean with train.routing_replay."""
KL = "kl"
"""The mean with kl.coef above 0."""


class Policy:
    """megatron-core's model, data parallelism and optimizer, and what training does to them."""

    def __init__(self, config: Config, fields: ModelFields):
        self.config = config
        self.objective = Objective(config)
        self.update_means = (
            *UPDATE_MEANS,
            *self.objective.metrics,
            *((KL,) if config.kl.coef else ()),
            *((ROUTING_CHANGED,) if config.train.routing_replay else ()),
        )
        """UPDATE_MEANS, and what the configured loss and penalty measure."""
        self.models = build_model(config, fields)
        self.routing = None
        if config.train.routing_replay and fields.experts is not None:
            self.routing = RoutingReplay(self.models, fields.experts)
        core: Any = self.models[0].config
        ddp = ddp_config(config)
        self.chunks = [
            DistributedDataParallel(core, ddp, Float16Module(core, m) if core.bf16 else m)
            for m in self.models
        ]
        chunks: Any = self.chunks
        self.optimizer: Any = get_megatron_optimizer(optimizer_config(config), chunks)
        self.scheduler = _learning_rate(config, self.optimizer)
        core.grad_scale_func = self.optimizer.scale_loss
        if ddp.overlap_grad_reduce:
            no_sync = [chunk.no_sync for chunk in self.chunks]
            core.no_sync_func = no_sync if config.parallel.vpp else no_sync[0]

    @classmethod
    def configured(cls, config: Config) -> Policy:
        """Of the architecture of model.hf, with random weights."""
        hf = read_hf_config(config.model.hf)
        return cls(config, family_of(hf).model_fields(hf))

    def weights_changed(self) -> None:
        """Copy weights that were written from outside into the optimizer's fp32 copies."""
        self.optimizer.reload_model_params()

    def score(self, batch: RolloutBatch) -> TokenStats:
        """What the policy says about every response token of a rollout, on every rank.

        Collectives: a forward pass, and one sum over all ranks of [4, T] fp32.
        """
        samples = list(range(batch.num_samples))
        values_4T = torch.zeros(4, batch.num_response_tokens)
        with torch.no_grad():
            results = self._run(batch, samples, _score_loss, forward_only=True)
        if parallel_state.get_tensor_model_parallel_rank() == 0:
            for slots_T, stats in results:
                values_4T[:, slots_T] = torch.stack(
                    [stats.logp_T, stats.entropy_T, stats.sum_p2_T, stats.sum_p2_logp_T]
                ).cpu()
        return TokenStats(*sum_over_ranks(values_4T))

    def old_logp(self, batch: RolloutBatch, scored: TokenStats) -> torch.Tensor:
        """ln q of a rollout's response tokens, [T]: where the importance ratio is p/q.

        Args:
            scored: what the policy says of the batch before a step's updates.
        """
        trainer = self.config.train.old_logprobs == "trainer"
        return scored.logp_T if trainer else batch.rollout_logp_T

    def prepare(self, streams: TokenStreams, scored: TokenStats, step: int) -> TokenStreams:
        """The streams with what the loss takes from the whole batch before the updates; the same on
        every rank, whatever the loss draws.

        Args:
            scored: what the policy says of the batch.
            step: counted from 1.
        """
        if not self.objective.prepares or not len(scored.logp_T):
            return streams
        return from_main(self.objective.prepare(streams, scored, step, self.config.seed))

    def update(
        self,
        batch: RolloutBatch,
        samples: list[int],
        streams: TokenStreams,
        bounds: Bounds,
        sums: Sums,
    ) -> dict[str, float]:
        """One optimizer step on one mini-batch, or no step if loss or gradient is not finite.

        If the loss or the gradient is not finite on any rank, all ranks leave the update out:
        weights, optimizer, learning-rate schedule and `sums` stay as they are.  The same happens
        if the mini-batch is empty, which rollout.overlong=drop can cause.

        Args:
            batch: the step's rollout.
            samples: sample numbers of the mini-batch, the same on every rank.
            streams: what the loss reads of the rollout's response tokens.
            bounds: this training step's thresholds.
            sums: takes this rank's share of `update_means` and UPDATE_MAXIMA.

        Returns:
            grad_norm (before clipping, over all ranks; NaN if the loss is not finite),
            learning_rate, skipped: whether the update was left out because of its numbers, and
            empty: whether there was nothing to learn from.
        """
        learning_rate = float(self.optimizer.param_groups[0]["lr"])
        made = {"grad_norm": 0.0, "learning_rate": learning_rate, "skipped": False, "empty": True}
        if not batch.response_lengths_N[samples].any():  # the same on every rank
            return made
        results = self.gradient(batch, samples, streams, bounds)
        self.optimizer.prepare_grads()
        grad_norm = float(self.optimizer.get_grad_norm())
        skipped = not math.isfinite(grad_norm)  # the same on every rank, see _spoilt_with
        if not skipped:
            if parallel_state.get_tensor_model_parallel_rank() == 0:
                for micro, loss, regions in results:
                    _add(sums, micro, loss)
                    _add_regions(sums, micro, regions)
            if self.routing is not None:
                sums.add(ROUTING_CHANGED, *self.routing.counts())
            self._step(grad_norm)
        return made | {"grad_norm": grad_norm, "skipped": skipped, "empty": False}

    def _step(self, grad_norm: float) -> None:
        """What follows in megatron-core's `ChainedOptimizer.step` once the norm is known.

        That method itself moves the weights whatever the norm is.
        """
        limit = self.config.optim.clip_grad
        for optimizer in self.optimizer.chained_optimizers:
            if limit > 0.0 and (params := optimizer.get_parameters()):
                clip_grad_by_total_norm_fp32(
                    params,
                    limit,
                    grad_norm,
                    optimizer.config.use_precision_aware_optimizer_no_fp8_or_ds_fp8,
                )
        self.optimizer.step_with_ready_grads()
        self.scheduler.step(increment=1)

    def gradient(
        self,
        batch: RolloutBatch,
        samples: list[int],
        streams: TokenStreams,
        bounds: Bounds,
    ) -> list[tuple[MicroBatch, LossOutputs, RegionSums]]:
        """The gradient of one mini-batch, over all ranks, into megatron-core's buffers.

        The arguments are those of `update`.

        Returns:
            On the last pipeline stage: this rank's micro-batches, each with what the loss says
            about its tokens and what those of each entropy region do; the same on tensor-parallel
            ranks.  Nothing on the other stages.
        """
        self._clear_gradient()
        loss = partial(
            _update_loss,
            objective=self.objective,
            streams=streams.map(lambda values_T: values_T.to(device())),
            bounds=bounds,
            mini_batch=(len(samples), int(batch.response_lengths_N[samples].sum())),
            config=self.config,
        )
        return self._run(batch, samples, loss, forward_only=False)

    def entropy_gradient(self, batch: RolloutBatch) -> None:
        """The gradient of mean entropy over a rollout's response tokens, over all ranks, into
        megatron-core's buffers."""
        self._clear_gradient()
        wanted = [model.entropy_grad for model in self.models]
        for model in self.models:
            model.entropy_grad = True
        self._run(batch, list(range(batch.num_samples)), _entropy_loss, forward_only=False)
        for model, before in zip(self.models, wanted, strict=True):
            model.entropy_grad = before

    def _clear_gradient(self) -> None:
        for chunk in self.chunks:
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()

    def _run(
        self, batch: RolloutBatch, samples: list[int], loss: Any, forward_only: bool
    ) -> list[Any]:
        """megatron-core's pipeline schedule over some samples; results on the last stage only.

        Without samples there are no results: the schedule cannot run without a micro-batch.
        """
        if not samples:
            return []
        p, limits = self.config.parallel, self.config.train
        whole = micro_batches(
            batch,
            samples,
            rank=parallel_state.get_data_parallel_rank(),
            ranks=parallel_state.get_data_parallel_world_size(),
            size=limits.micro_batch_size,
            budget=limits.micro_batch_tokens,
            multiple_of=multiples(p),
            count_multiple=p.pp if p.vpp else 1,
        )
        made = [
            context_part(micro, parallel_state.get_context_parallel_rank(), p.cp) for micro in whole
        ]
        if self.routing is not None:
            self.routing.forget()
        iterators = [iter(made) for _ in self.chunks]
        model: Any = self.chunks if p.vpp else self.chunks[0]
        core: Any = self.models[0].config
        tokens = int(batch.response_lengths_N[samples].sum())
        core.finalize_model_grads_func = partial(_finalize, divisor=tokens)
        lengths = {len(micro.tokens_S) for micro in made}
        core.variable_seq_lengths = p.pp > 1 and len(lengths) > 1  # then stages exchange shapes
        return get_forward_backward_func()(
            forward_step_func=partial(_forward, loss=loss),
            data_iterator=iterators if p.vpp else iterators[0],
            model=model,
            num_microbatches=len(made),
            seq_length=max(lengths) * p.cp,
            micro_batch_size=1,
            forward_only=forward_only,
            collect_non_loss_data=forward_only,
        )


def _finalize(models: Any, num_tokens: torch.Tensor, divisor: int, **given: Any) -> None:
    """Sums gradients over ranks and divides them.  megatron-core would find the divisor by two more
    collectives over `num_tokens`, which the last stage has counted."""
    finalize_model_grads(models, None, **given)
    if divisor:
        for chunk in models:
            chunk.scale_gradients(1.0 / divisor)


def _forward(iterator: Iterator[MicroBatch], model: Any, loss: Any) -> tuple[Any, Any]:
    micro, to = next(iterator), device()
    routes = None if micro.routes is None else micro.routes.to(to)
    output = model(
        micro.tokens_S.to(to), micro.lengths_B, micro.rows_T.to(to), micro.targets_T.to(to), routes
    )
    return output, partial(loss, micro)


def _score_loss(
    micro: MicroBatch, stats: TokenStats, non_loss_data: bool
) -> tuple[torch.Tensor, TokenStats]:
    assert non_loss_data
    return micro.slots_T, stats


def _update_loss(
    micro: MicroBatch,
    stats: TokenStats,
    *,
    objective: Objective,
    streams: TokenStreams,
    bounds: Bounds,
    mini_batch: tuple[int, int],
    config: Config,
) -> tuple[torch.Tensor, torch.Tensor, tuple[MicroBatch, LossOutputs, RegionSums]]:
    """(summed loss, token count, result), as the schedules want it."""
    streams = streams.at(micro.slots_T.to(stats.device))
    # w min(r A, clip(r) A) = min(r (w A), clip(r) (w A)), because w is not negative
    advantages_T = streams.advantages_T * streams.weights_T
    constant = TokenStats(
        stats.logp_T.detach(), stats.entropy_T.detach(), stats.sum_p2_T, stats.sum_p2_logp_T
    )
    masks = region_masks(constant.logp_T, constant.entropy_T, advantages_T)
    outputs = objective(
        LossInputs(
            stats.logp_T,
            stats.entropy_T,
            keep_regions(advantages_T, masks, config.clip.regions),
            bounds,
            streams,
            *mini_batch,
            add_over_ranks=_add_over_context_ranks,
        )
    )
    loss_sum, metrics = outputs.loss_sum, dict(outputs.metrics)
    if config.train.entropy_coef != 0.0:
        loss_sum = loss_sum - config.train.entropy_coef * stats.entropy_T.sum()
    if streams.reference_logp_T is not None:
        kl_T = k3(stats.logp_T, streams.reference_logp_T)
        loss_sum = loss_sum + config.kl.coef * kl_T.sum()
        metrics[KL] = kl_T.detach()
    # asked of autograd, so that it is what the objective gives each token, whatever that is
    (loss_grad_T,) = torch.autograd.grad(loss_sum, stats.logp_T, retain_graph=True)
    clipped_T = outputs.clipped_low_T | outputs.clipped_high_T
    regions = region_sums(constant, masks, -loss_grad_T, clipped_T)
    # the schedule frees the loss after its backward pass
    kept = replace(outputs, loss_sum=loss_sum.detach().clone(), metrics=metrics)
    stats.logp_T.register_hook(partial(_spoilt_with, kept.loss_sum))
    return loss_sum, _count(micro, stats), (micro, kept, regions)


def _spoilt_with(loss_sum: torch.Tensor, grad_T: torch.Tensor) -> torch.Tensor:
    """The gradient, or NaN for every token if the loss is not finite: NaN gets from there into the
    gradients of all ranks and their norm, so that they all leave the update out."""
    return grad_T.where(loss_sum.isfinite(), torch.nan)


def _add_over_context_ranks(sums: torch.Tensor) -> torch.Tensor:
    """All of them run the same micro-batches in the same order, so all enter."""
    if parallel_state.get_context_parallel_world_size() > 1:
        dist.all_reduce(sums, group=parallel_state.get_context_parallel_group())
    return sums


def _entropy_loss(
    micro: MicroBatch, stats: TokenStats
) -> tuple[torch.Tensor, torch.Tensor, tuple[()]]:
    return stats.entropy_T.sum(), _count(micro, stats), ()


def _count(micro: MicroBatch, stats: TokenStats) -> torch.Tensor:
    return torch.tensor(len(micro.slots_T), dtype=torch.int, device=stats.device)


def _add(sums: Sums, micro: MicroBatch, loss: LossOutputs) -> None:
    """Add one micro-batch's UPDATE_MAXIMA and `update_means`, except those of the regions."""
    count = len(micro.slots_T)
    sums.add("loss", loss.loss_sum, count)
    sums.add("ratio_mean", loss.ratio_T.sum(), count)
    sums.add("clip_fraction_low", loss.clipped_low_T.sum(), count)
    sums.add("clip_fraction_high", loss.clipped_high_T.sum(), count)
    for name, values_T in loss.metrics.items():
        sums.add(name, values_T.sum(), count)
    if count:
        sums.add_max("ratio_max", loss.ratio_T.max())
    sums.add("padding_fraction", micro.padding, sum(micro.lengths_B))


def _add_regions(sums: Sums, micro: MicroBatch, regions: RegionSums) -> None:
    tokens = torch.tensor(float(len(micro.slots_T)), device=regions.dh.device)
    sums.add_each(CLIP_FRACTIONS, regions.clipped, regions.tokens)
    sums.add_each(GRADIENT_SHARES, regions.mass, regions.all_mass)
    sums.add_each(DH_PREDICTED, regions.dh, tokens)
    sums.add("dh_predicted", regions.all_dh, tokens)


def _learning_rate(config: Config, optimizer: Any) -> OptimizerParamScheduler:
    o = config.optim
    updates = config.train.steps * config.train.mini_batches * config.train.epochs
    return OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=o.lr,
        min_lr=o.min_lr if o.decay != "constant" else 0.0,
        lr_warmup_steps=o.warmup_updates,
        lr_decay_steps=max(updates, o.warmup_updates + 1),
        lr_decay_style=o.decay,
        start_wd=o.weight_decay,
        end_wd=o.weight_decay,
        wd_incr_steps=0,
        wd_incr_style="constant",
    )
