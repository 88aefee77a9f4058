"""What layouts are compared on: models, a rollout of very unequal lengths, the float64 reference.

The reference knows nothing of our code but the table of weights: transformers' model in float64,
one sequence at a time, and the loss as the paper has it.  (transformers computes norms, rotary
embeddings and the router's softmax in fp32 whatever the model's type.)
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from objectives import HI, LO, Objective, Tokens, clip
from safetensors.torch import load_file
from tiny import random_batch
from tiny_models import make_model

from megatron_gpc.algo.clipping import affine_bounds
from megatron_gpc.types import RolloutBatch
from megatron_gpc.weights import family_of, to_megatron
from megatron_gpc.weights.folders import read_hf_config

BOUNDS = affine_bounds(HI, LO)
MODELS = {  # of tests/tiny_models.py, here with 4 layers
    "dense": "qwen2-untied",
    "tied": "qwen2-tied",
    "qk-norm": "qwen3",
    "moe": "qwen3_moe",
}
RESPONSES = (100, 1, 1, 37, 1, 8, 64, 2, 1, 12, 5, 1)
"""Response lengths; prompts have 2 to 5 tokens."""


@dataclass(frozen=True)
class Reference:
    """float64 numbers of a mini-batch.  [T] over its response tokens, in the order of samples."""

    loss: float
    ratio_mean: float
    ratio_max: float
    logp_T: torch.Tensor
    entropy_T: torch.Tensor
    sum_p2_T: torch.Tensor
    sum_p2_logp_T: torch.Tensor
    clip_decisions: list[tuple[bool, bool]]
    """(clipped below, clipped above) of every token."""
    margin: float
    """How far the ratio nearest to a bound is from it, relatively."""
    gradient: dict[str, torch.Tensor]
    """By Megatron's names."""
    kl: float = 0.0
    """Mean k3 from the reference model."""

    @property
    def grad_norm(self) -> float:
        return float(torch.stack([g.norm() for g in self.gradient.values()]).norm())


@dataclass(frozen=True)
class Problem:
    """A model and a rollout whose old log-probs lie around the model's, so that clipping acts."""

    hf: Path
    batch: RolloutBatch

    def slots(self, samples: list[int]) -> list[int]:
        """Where the response tokens of some samples stand in the rollout's packed arrays."""
        every = range(self.batch.num_response_tokens)
        return [slot for n in samples for slot in every[self.batch.response_slice(n)]]

    def reference(
        self,
        folder: Path,
        samples: list[int] | None = None,
        entropy_coef: float = 0.0,
        kept: str = "1234",
        objective: Objective = clip,
        kl: tuple[float, Path] | None = None,
    ) -> Reference:
        """Of all samples unless some are named; `folder` takes the gradient as a checkpoint.

        Args:
            kept: numbers of the entropy regions whose tokens give gradient.
            kl: weight of the KL term, and the folder of the reference model.
        """
        if samples is None:
            samples = list(range(self.batch.num_samples))
        return _reference(self, folder, samples, entropy_coef, kept, objective, kl)


def make_problem(name: str, folder: Path, routes: bool = False, **changes: Any) -> Problem:
    """The problem of MODELS[name], its checkpoint in `folder`.

    Args:
        routes: whether the rollout sent tokens to experts that no router would have chosen.
        changes: settings of the model.
    """
    make_model(MODELS[name], num_hidden_layers=4, **changes).save_pretrained(folder / "hf")
    batch = random_batch(3, 4, responses=RESPONSES)
    if routes:
        batch = dataclasses.replace(batch, routes=_random_routes(folder / "hf", batch))
    problem = Problem(folder / "hf", batch)
    logp_T = problem.reference(folder).logp_T
    noise_T = 0.4 * torch.randn(len(logp_T), generator=torch.Generator().manual_seed(1))
    batch = dataclasses.replace(problem.batch, rollout_logp_T=logp_T.float() + noise_T)
    return dataclasses.replace(problem, batch=batch)


def own_routes(problem: Problem) -> torch.Tensor:
    """RolloutBatch.routes that the model's own routers choose, in float64."""
    batch, model = problem.batch, _model(problem.hf)
    parts: list[torch.Tensor] = []
    for n, start in enumerate(batch.starts_N.tolist()):
        length = int(batch.prompt_lengths_N[n] + batch.response_lengths_N[n])
        with torch.no_grad():
            tokens = batch.tokens[None, start : start + length]
            logits = model(tokens, output_router_logits=True).router_logits
        routes = torch.cat(
            [one.topk(model.config.num_experts_per_tok).indices for one in logits], 1
        )
        routes[-1] = -1
        parts.append(routes.to(torch.int16))
    return torch.cat(parts)


def _random_routes(hf: Path, batch: RolloutBatch) -> torch.Tensor:
    config = read_hf_config(hf)
    experts = family_of(config).model_fields(config).experts
    assert experts is not None
    shape = (len(batch.tokens), len(experts.layers), experts.count)
    drawn = torch.rand(shape, generator=torch.Generator().manual_seed(2))
    routes = drawn.argsort(-1)[..., : experts.topk].flatten(1).to(torch.int16)
    routes[batch.starts_N + batch.prompt_lengths_N + batch.response_lengths_N - 1] = -1
    return routes


def _follow_routes(model: transformers.PreTrainedModel, routes: torch.Tensor | None) -> list[Any]:
    """Have the model's routers choose so for one sequence; what has to be removed again."""
    if routes is None:
        return []
    routers = [m for m in model.modules() if type(m).__name__.endswith("TopKRouter")]
    wanted = routes.long().view(len(routes), len(routers), -1).unbind(1)

    def hook(router: Any, given: Any, found: Any, wanted_SK: torch.Tensor) -> Any:
        logits_SE, _, own_SK = found
        chosen_SK = torch.where(wanted_SK < 0, own_SK, wanted_SK)
        scores_SK = logits_SE.softmax(-1).gather(1, chosen_SK)
        if router.norm_topk_prob:
            scores_SK = scores_SK / scores_SK.sum(-1, keepdim=True)
        return logits_SE, scores_SK, chosen_SK

    return [
        router.register_forward_hook(partial(hook, wanted_SK=one))
        for router, one in zip(routers, wanted, strict=True)
    ]


def _model(hf: Path) -> transformers.PreTrainedModel:
    return transformers.AutoModelForCausalLM.from_pretrained(
        hf, dtype=torch.float64, attn_implementation="eager", experts_implementation="eager"
    )


def _stats(
    model: transformers.PreTrainedModel, batch: RolloutBatch, samples: list[int]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(log-probs, entropies, [sum p^2, sum p^2 ln p]) of the samples' response tokens."""
    logp, p2, stats = [], [], []
    for n in samples:
        start, prompt = int(batch.starts_N[n]), int(batch.prompt_lengths_N[n])
        tokens = batch.tokens[start : start + prompt + int(batch.response_lengths_N[n])]
        routes = None if batch.routes is None else batch.routes[start : start + len(tokens)]
        hooks = _follow_routes(model, routes)
        logp_SV = model(tokens[None]).logits[0, prompt - 1 : -1].log_softmax(-1)
        for hook in hooks:
            hook.remove()
        p_SV = logp_SV.exp()
        logp.append(logp_SV.gather(1, tokens[prompt:, None])[:, 0])
        stats.append(-(p_SV * logp_SV).sum(-1))
        p2.append(torch.stack([(p_SV**2).sum(-1), (p_SV**2 * logp_SV).sum(-1)]))
    return torch.cat(logp), torch.cat(stats), torch.cat(p2, 1).detach()


def _reference(
    problem: Problem,
    folder: Path,
    samples: list[int],
    entropy_coef: float,
    kept: str,
    objective: Objective,
    kl: tuple[float, Path] | None,
) -> Reference:
    batch, model = problem.batch, _model(problem.hf)
    logp_T, entropy_T, p2_2T = _stats(model, batch, samples)
    old_logp_T = torch.cat(
        [batch.rollout_logp_T[batch.response_slice(n)] for n in samples]
    ).double()
    lengths = batch.response_lengths_N[samples]
    a_T = batch.advantages_N[samples].double().repeat_interleave(lengths)
    likely_T = (-logp_T < entropy_T).tolist()
    region_T = [
        ("1" if likely else "2") if a > 0 else ("3" if likely else "4")
        for likely, a in zip(likely_T, a_T.tolist(), strict=True)
    ]
    a_T = a_T * torch.tensor([region in kept for region in region_T])
    found = objective(Tokens(logp_T, old_logp_T, a_T, lengths.tolist()))
    loss, mean_kl = found.loss - entropy_coef * entropy_T.mean(), torch.zeros(())
    if kl is not None:
        with torch.no_grad():
            reference_logp_T = _stats(_model(kl[1]), batch, samples)[0]
        log_r_T = reference_logp_T - logp_T
        mean_kl = (log_r_T.exp() - 1 - log_r_T).mean()
        loss = loss + kl[0] * mean_kl
    loss.backward()
    return Reference(
        loss=loss.item(),
        ratio_mean=found.ratio_T.mean().item(),
        ratio_max=found.ratio_T.max().item(),
        logp_T=logp_T.detach(),
        entropy_T=entropy_T.detach(),
        sum_p2_T=p2_2T[0],
        sum_p2_logp_T=p2_2T[1],
        clip_decisions=list(zip(found.low_T.tolist(), found.high_T.tolist(), strict=True)),
        margin=found.margin,
        kl=mean_kl.item(),
        gradient=_gradient(model, problem.hf, folder / "gradient"),
    )


def _gradient(
    model: transformers.PreTrainedModel, hf: Path, folder: Path
) -> dict[str, torch.Tensor]:
    """The gradients, saved like weights: they get a checkpoint's names, and the table applies."""
    with torch.no_grad():
        for parameter in model.parameters():
            gradient = parameter.grad
            parameter.copy_(torch.zeros_like(parameter) if gradient is None else gradient)
    model.save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    config = read_hf_config(hf)
    return {
        param.megatron: to_megatron(param, [tensors[name] for name in param.hf])
        for param in family_of(config).params(config)
    }
