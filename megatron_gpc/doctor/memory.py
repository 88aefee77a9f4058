"""How much memory a layout takes on its fullest GPU, from the model's table of parameters.

A bookkeeping of what must be there, for choosing a layout; not a measurement.  GiB = 2^30 bytes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from megatron_gpc.config import Config, ParallelConfig
from megatron_gpc.kernels import chunk_vocab, keeps_logits
from megatron_gpc.weights import Param, family_of

GIB = 2**30


@dataclass(frozen=True)
class Estimate:
    """Bytes on the fullest GPU, trainer and one rank of an engine; `kv_token` is a token's."""

    parameters: int
    """Of the model, whole."""
    weights: float
    gradients: float
    optimizer: float
    activations: float
    logits: float
    """With their gradient, that of the LM head, and what log-prob and entropy take."""
    update: float
    """For torch's Adam, what it takes beyond the room that activations and logits have left."""
    engine_weights: float
    kv_token: float

    @property
    def trainer(self) -> float:
        return sum(getattr(self, name) for name in TRAINER)


TRAINER = ("weights", "gradients", "optimizer", "activations", "logits", "update")
"""An Estimate's parts that the trainer has at a time."""


def estimate(config: Config, hf: Mapping[str, Any], world: int) -> Estimate:
    """What a run takes.

    Args:
        hf: the model's config.json.
        world: number of training processes.

    Raises:
        UserError: the model is not supported.
    """
    p, family = config.parallel, family_of(hf)
    params = family.params(hf, p.tp)
    model = family.model_fields(hf)
    size = 2 if config.model.dtype == "bfloat16" else 4
    dp = world // (p.tp * p.pp * p.cp)
    dense, expert = max(
        (_parameters(params, p, stage, model.transformer["num_layers"]) for stage in range(p.pp)),
        key=sum,
    )
    # Adam's two moments, and an fp32 copy if the weights are not fp32 themselves.
    state = 12 if size == 2 else 8
    copies = (dp * p.cp, max(1, dp * p.cp // p.ep)) if config.optim.distributed else (1, 1)
    sizes = model.transformer
    head, groups = sizes["kv_channels"], sizes["num_query_groups"]
    engine_tp = int(config.sglang.args.get("tp_size", 1))
    everything = sum(_numel(param) for param in params)
    held = dense / copies[0] + expert / copies[1]
    activations = activation_bytes(config, sizes)
    logits = head_bytes(config, model.vocab_size, sizes["hidden_size"])
    return Estimate(
        parameters=everything,
        weights=size * (dense + expert),
        gradients=4 * (dense + expert),
        optimizer=state * held,
        activations=activations,
        logits=logits,
        update=max(0.0, 4 * held - activations - logits),  # the roots of all second moments
        engine_weights=size * everything / engine_tp,
        kv_token=2 * size * sizes["num_layers"] * max(1, groups / engine_tp) * head,
    )


def activation_bytes(config: Config, sizes: Mapping[str, Any]) -> float:
    """What the first pipeline stage keeps for the backward pass.

    A layer keeps, a token, its inputs and those of its matrices: 4 hidden + 2 q + 2 kv + 3 ffn
    values with fused attention (after arXiv 2205.05198).  With recomputation in full it keeps its
    input alone, and one layer's worth exists at a time.  Experts that are computed in one product
    are beside each other meanwhile.  The schedule keeps pp micro-batches on the
    first stage.
    """
    p, size = config.parallel, 2 if config.model.dtype == "bfloat16" else 4
    tokens = longest_micro_batch(config) / p.cp
    hidden = sizes["hidden_size"] / (p.tp if p.sequence_parallel else 1)
    q = sizes["num_attention_heads"] * sizes["kv_channels"] / p.tp
    kv = sizes["num_query_groups"] * sizes["kv_channels"] / p.tp
    ffn = sizes["ffn_hidden_size"] / p.tp
    routed = beside = 0.0
    if "num_moe_experts" in sizes:  # tokens are copied to each of their experts
        routed = 2 * sizes["moe_router_topk"] * hidden
        ffn = sizes["moe_router_topk"] * sizes["moe_ffn_hidden_size"] / p.tp
        if config.train.experts != "each":  # matrices side by side, and their gradient (experts.py)
            experts = sizes["num_moe_experts"] / p.ep
            grouped = 2 * size * experts * 2 * sizes["hidden_size"] * sizes["moe_ffn_hidden_size"]
            beside = grouped / p.tp
    layer = size * tokens * (4 * hidden + 2 * q + 2 * kv + 3 * ffn + routed)
    layers = sizes["num_layers"] / p.pp
    if config.megatron.transformer.get("recompute_granularity") == "full":
        return p.pp * layers * size * tokens * hidden + layer + beside
    return p.pp * layers * layer + beside


def head_bytes(config: Config, vocab: int, hidden: int) -> float:
    """What the last pipeline stage takes for logits and what is made of them.

    With train.head=logits, log-prob and entropy take three fp32 copies of a chunk beside the
    logits; on the way back two beside logits and their gradient, and then comes the gradient of the
    LM head.  Otherwise there are a chunk's logits, or all that are kept, and become their own
    gradient; and the hidden states' gradient, in fp32, with a product that is added to it.
    """
    p, size = config.parallel, 2 if config.model.dtype == "bfloat16" else 4
    responses = config.train.micro_batch_size * config.rollout.max_response_tokens
    rows = min(longest_micro_batch(config), responses) / p.cp
    row = vocab / p.tp
    logits, weight = size * rows * row, size * hidden * row
    if config.train.head == "logits":
        chunk = 4 * min(config.train.logit_chunk_tokens, rows) * row
        return max(logits + 3 * chunk, 2 * logits + max(2 * chunk, weight))
    if config.train.head == "fused" or not keeps_logits(logits):
        logits = size * rows * min(row, chunk_vocab(int(rows), "cuda"))
    return rows * hidden * (4 + size) + max(logits, weight)


def longest_micro_batch(config: Config) -> int:
    """Tokens of the largest forward pass, if every response is as long as allowed; a prompt is
    taken to have PROMPT_TOKENS."""
    longest = config.rollout.max_response_tokens + PROMPT_TOKENS
    tokens = config.train.micro_batch_size * longest
    return max(longest, min(tokens, config.train.micro_batch_tokens or tokens))


PROMPT_TOKENS = 1024
"""More than all but a few of DAPO-Math-17k's prompts have."""


def _numel(param: Param) -> int:
    count = 1
    for length in param.shape:
        count *= length
    return count


def _parameters(
    params: tuple[Param, ...], p: ParallelConfig, stage: int, layers: int
) -> tuple[float, float]:
    """(dense, expert) parameters of one rank of a pipeline stage."""
    dense = expert = 0.0
    for param in params:
        if param.layer is not None:
            here = param.layer // -(-layers // p.pp) == stage
        else:  # the embedding is the first stage's; what follows the last layer, the last stage's
            first = param.megatron.startswith("embedding")
            here = stage == (0 if first else p.pp - 1)
        if here:
            part = _numel(param) / (p.tp if param.split_dim is not None else 1)
            if param.expert is None:
                dense += part
            else:
                expert += part / p.ep
    return dense, expert


def lines(found: Estimate, gpu_gib: float, fraction: float) -> list[str]:
    """The estimate as text, a line each.

    Args:
        gpu_gib: memory of one GPU.
        fraction: the share of it that the engine takes (SGLang's mem_fraction_static).
    """
    said = [f"{found.parameters / 1e9:.2f} B parameters; GiB on the fullest GPU:"]
    said += [f"  {name:<14}{getattr(found, name) / GIB:6.1f}" for name in TRAINER]
    cache = fraction * gpu_gib * GIB - found.engine_weights
    total = found.trainer / GIB + fraction * gpu_gib
    said += [
        f"  {'trainer':<14}{found.trainer / GIB:6.1f}",
        f"  {'engine':<14}{fraction * gpu_gib:6.1f}   weights "
        f"{found.engine_weights / GIB:.1f}, KV cache {cache / GIB:.1f} = "
        f"{cache / found.kv_token:,.0f} tokens",
        f"  {'both':<14}{total:6.1f}   of {gpu_gib:g}",
    ]
    return said
