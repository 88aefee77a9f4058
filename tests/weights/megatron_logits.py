"""Logits of megatron-core's GPTModel against stored ones, at several layouts.

    torchrun --nproc-per-node 4 megatron_logits.py CHECKPOINTS OUT.json

CHECKPOINTS/NAME holds a checkpoint and `logits.pt` with tokens [B, S] and logits [B, S, vocab].
OUT.json gets NAME -> layout -> the largest absolute difference.
"""

from __future__ import annotations

import json
import sys
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

from megatron_gpc.mcore import cpu

cpu.install()

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from megatron.core import parallel_state  # noqa: E402
from megatron.core.models.gpt import GPTModel  # noqa: E402
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec  # noqa: E402
from megatron.core.pipeline_parallel import get_forward_backward_func  # noqa: E402
from megatron.core.tensor_parallel import (  # noqa: E402
    gather_from_tensor_model_parallel_region,
    model_parallel_cuda_manual_seed,
)
from megatron.core.transformer import TransformerConfig  # noqa: E402

from megatron_gpc.mcore.weights import named_shards  # noqa: E402
from megatron_gpc.weights import HFReader, family_of, padded_vocab_size, shard, to_megatron  # noqa: E402

LAYOUTS = {  # name -> tp, pp, ep
    "tp1": (1, 1, 1), "tp2 pp2": (2, 2, 1), "tp4": (4, 1, 1),
    "ep2": (1, 1, 2), "pp2 ep2": (1, 2, 2), "tp2 ep2": (2, 1, 2),
}


def build(config: dict[str, Any], tp: int, pp: int, ep: int) -> GPTModel:
    fields = family_of(config).model_fields(config)
    core = TransformerConfig(
        **{**fields.transformer, "activation_func": torch.nn.functional.silu},
        tensor_model_parallel_size=tp, pipeline_model_parallel_size=pp,
        expert_model_parallel_size=ep, pipeline_dtype=torch.float32,
        moe_token_dispatcher_type="alltoall",
        gradient_accumulation_fusion=False, masked_softmax_fusion=False,
        bias_activation_fusion=False, bias_dropout_fusion=False, apply_rope_fusion=False,
        persist_layer_norm=False)
    for name, value in fields.config_attributes.items():
        setattr(core, name, value)
    return GPTModel(
        core, get_gpt_decoder_block_spec(
            core, use_transformer_engine=False, normalization="RMSNorm"),
        padded_vocab_size(fields.vocab_size, tp), fields.max_position_embeddings,
        pre_process=parallel_state.is_pipeline_first_stage(),
        post_process=parallel_state.is_pipeline_last_stage(), **fields.gpt).eval()


def fill(model: GPTModel, config: dict[str, Any], folder: Path, tp: int) -> None:
    reader = HFReader(folder)
    table = {param.megatron: param for param in family_of(config).params(config, tp)}
    for name, (parameter, rank, size) in named_shards([model]).items():
        whole = to_megatron(table[name], [reader.get(hf) for hf in table[name].hf])
        parameter.copy_(shard(table[name], whole, rank, size))


def largest_difference(folder: Path, tp: int, pp: int, ep: int) -> float:
    config = json.loads((folder / "config.json").read_text())
    stored = torch.load(folder / "logits.pt")
    model = build(config, tp, pp, ep)
    fill(model, config, folder, tp)
    tokens = stored["tokens"]

    def keep(logits: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        return logits.sum(), {"logits": gather_from_tensor_model_parallel_region(logits)}

    def forward(iterator: Any, model: GPTModel) -> tuple[torch.Tensor, Any]:
        positions = torch.arange(tokens.shape[1]).expand_as(tokens)
        return model(tokens, positions, None), partial(keep)

    out = get_forward_backward_func()(
        forward_step_func=forward, data_iterator=iter([None]), model=model, num_microbatches=1,
        seq_length=tokens.shape[1], micro_batch_size=len(tokens), forward_only=True)
    mine = 0.0
    if out:  # the last stage
        logits = out[0]["logits"][..., : stored["logits"].shape[-1]]
        mine = (logits - stored["logits"]).abs().max().item()
    everyone: list[float] = [0.0] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    return max(everyone)


@torch.no_grad()
def main(root: Path, out: Path) -> None:
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    found: dict[str, dict[str, float]] = {folder.name: {} for folder in root.iterdir()}
    for layout, (tp, pp, ep) in LAYOUTS.items():  # the outer loop: process groups are never freed
        parallel_state.initialize_model_parallel(
            tp, pp, expert_model_parallel_size=ep, create_gloo_process_groups=False)
        model_parallel_cuda_manual_seed(1, force_reset_rng=True)
        for name in sorted(found):
            if ep == 1 or "moe" in name:
                found[name][layout] = largest_difference(root / name, tp, pp, ep)
        parallel_state.destroy_model_parallel()
    if dist.get_rank() == 0:
        out.write_text(json.dumps(found, indent=1))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
