"""What layouts are compared on: models, a rollout of very unequal lengths, the float64 reference.

The reference knows nothing of our code but the table of weights: transformers' model in float64,
one sequence at a time, and the loss as the paper has it.  (transformers computes norms, rotary
embeddings and the router's softmax in fp32 whatever the model's type.)
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from safetensors.torch import load_file
from tiny import random_batch
from tiny_models import make_model

from megatron_gpc.algo.clipping import affine_bounds
from megatron_gpc.types import RolloutBatch
from megatron_gpc.weights import family_of, to_megatron
from megatron_gpc.weights.folders import read_hf_config

# ID's first step: Hi(p) = 0.5 - p/4 above, Lo(p) = 0.3 - 0.13 p below
HI, LO = (-0.25, 0.5), (-0.13, 0.3)
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
    ) -> Reference:
        """Of all samples unless some are named; `folder` takes the gradient as a checkpoint.

        Args:
            kept: numbers of the entropy regions whose tokens give gradient.
        """
        if samples is None:
            samples = list(range(self.batch.num_samples))
        return _reference(self, folder, samples, entropy_coef, kept)


def make_problem(name: str, folder: Path) -> Problem:
    """The problem of MODELS[name], its checkpoint in `folder`."""
    make_model(MODELS[name], num_hidden_layers=4).save_pretrained(folder / "hf")
    problem = Problem(folder / "hf", random_batch(3, 4, responses=RESPONSES))
    logp_T = problem.reference(folder).logp_T
    noise_T = 0.4 * torch.randn(len(logp_T), generator=torch.Generator().manual_seed(1))
    batch = dataclasses.replace(problem.batch, rollout_logp_T=logp_T.float() + noise_T)
    return dataclasses.replace(problem, batch=batch)


def _reference(
    problem: Problem, folder: Path, samples: list[int], entropy_coef: float, kept: str
) -> Reference:
    batch = problem.batch
    model = transformers.AutoModelForCausalLM.from_pretrained(
        problem.hf,
        dtype=torch.float64,
        attn_implementation="eager",
        experts_implementation="eager",
    )
    logp, p2, stats = [], [], []
    for n in samples:
        start, prompt = int(batch.starts_N[n]), int(batch.prompt_lengths_N[n])
        tokens = batch.tokens[start : start + prompt + int(batch.response_lengths_N[n])]
        logp_SV = model(tokens[None]).logits[0, prompt - 1 : -1].log_softmax(-1)
        p_SV = logp_SV.exp()
        logp.append(logp_SV.gather(1, tokens[prompt:, None])[:, 0])
        stats.append(-(p_SV * logp_SV).sum(-1))
        p2.append(torch.stack([(p_SV**2).sum(-1), (p_SV**2 * logp_SV).sum(-1)]))
    logp_T, entropy_T, p2_2T = torch.cat(logp), torch.cat(stats), torch.cat(p2, 1).detach()

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
    r_T, p_T = (logp_T - old_logp_T).exp(), logp_T.detach().exp()
    low_T, high_T = 1 - (LO[0] * p_T + LO[1]), 1 + (HI[0] * p_T + HI[1])
    surrogate_T = torch.minimum(r_T * a_T, r_T.clamp(low_T, high_T) * a_T)
    loss = -(surrogate_T + entropy_coef * entropy_T).mean()
    loss.backward()
    r_T = r_T.detach()
    return Reference(
        loss=loss.item(),
        ratio_mean=r_T.mean().item(),
        ratio_max=r_T.max().item(),
        logp_T=logp_T.detach(),
        entropy_T=entropy_T.detach(),
        sum_p2_T=p2_2T[0],
        sum_p2_logp_T=p2_2T[1],
        clip_decisions=list(
            zip(
                ((r_T < low_T) & (a_T < 0)).tolist(),
                ((r_T > high_T) & (a_T > 0)).tolist(),
                strict=True,
            )
        ),
        margin=float(torch.cat([r_T / low_T - 1, r_T / high_T - 1]).abs().min()),
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
