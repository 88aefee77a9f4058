"""What the ranks of a pool do in these tests; every function runs on all ranks at once."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from ranks import groups
from tiny import plain_streams

from megatron_gpc.config import Config
from megatron_gpc.types import Bounds, RolloutBatch, TrainState


def logits_of(
    config: Config, checkpoints: dict[str, tuple[Path, Path]], sequences: Sequence[Sequence[int]]
) -> dict[str, list[torch.Tensor]]:
    """Name -> logits of a converted checkpoint, where this rank has them.

    Also holds the weights to those that training takes straight from the Hugging Face folder.

    Args:
        checkpoints: name -> Hugging Face folder, distributed checkpoint.
    """
    from megatron_gpc.mcore.checkpoint.state import load_weights
    from megatron_gpc.mcore.logits import sequence_logits
    from megatron_gpc.mcore.model import build_model
    from megatron_gpc.mcore.weights import load_hf
    from megatron_gpc.weights import family_of, places_of
    from megatron_gpc.weights.folders import read_hf_config

    found = {}
    with groups(config):
        for name, (hf, checkpoint) in checkpoints.items():
            hf_config = read_hf_config(hf)
            family = family_of(hf_config)
            params, fields = (
                family.params(hf_config, config.parallel.tp),
                family.model_fields(hf_config),
            )
            models = build_model(config, fields)
            load_weights(checkpoint, models, places_of(params, fields))
            weights = [p.detach().clone() for model in models for p in model.parameters()]
            logits = sequence_logits(config, models, sequences)
            if logits is not None:
                found[name] = logits
            load_hf(models, params, hf, family.copies(hf_config))
            direct = [p for model in models for p in model.parameters()]
            assert all(torch.equal(a, b) for a, b in zip(weights, direct, strict=True)), name
    return found


def refusal(config: Config, hf: Path, checkpoint: Path) -> str:
    """What loading a damaged checkpoint says."""
    from megatron_gpc.errors import UserError

    try:
        logits_of(config, {"": (hf, checkpoint)}, [[1]])
    except UserError as error:
        return str(error)
    return ""


def start_update_save(
    config: Config, batch: RolloutBatch, bounds: Bounds
) -> tuple[Path, dict[str, torch.Tensor]]:
    """Start from model.hf as training does, update once, save; the checkpoint, and the weights as
    weight sync gives them (on rank 0)."""
    from megatron_gpc.mcore.checkpoint.checkpoints import Checkpoints
    from megatron_gpc.mcore.checkpoint.folder import checkpoints
    from megatron_gpc.mcore.checkpoint.load import load_folder
    from megatron_gpc.mcore.policy import UPDATE_MAXIMA, UPDATE_MEANS, Policy
    from megatron_gpc.mcore.weights import Exporter
    from megatron_gpc.metrics.reduce import Sums
    from megatron_gpc.weights import family_of
    from megatron_gpc.weights.folders import read_hf_config

    with groups(config):
        hf_config = read_hf_config(config.model.hf)
        family = family_of(hf_config)
        policy = Policy(config, family.model_fields(hf_config))
        params = family.params(hf_config, config.parallel.tp)
        load_folder(policy, config.model.hf)
        policy.weights_changed()
        policy.score(batch)
        samples = list(range(batch.num_samples))
        sums = Sums(UPDATE_MEANS, UPDATE_MAXIMA)
        policy.update(
            batch,
            samples,
            plain_streams(batch),
            bounds,
            sums,
        )
        saving = Checkpoints(config, policy)
        saving.save(TrainState(1))
        saving.wait()
        (folder,) = checkpoints(config.run_dir)
        return folder, dict(Exporter(policy.models, params).tensors())


def described(folder: Path) -> dict[str, Any]:
    """Key -> (shape, dtype, pieces) of the model's tensors, as the checkpoint's metadata says."""
    from torch.distributed.checkpoint import FileSystemReader, TensorStorageMetadata

    return {
        key: (
            tuple(value.size),
            value.properties.dtype,
            {(tuple(piece.offsets), tuple(piece.sizes)) for piece in value.chunks},
        )
        for key, value in FileSystemReader(folder).read_metadata().state_dict_metadata.items()
        if isinstance(value, TensorStorageMetadata) and not key.startswith("optimizer.")
    }
