"""Whether a checkpoint has what its configuration says, and can be a run's reference model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_gpc.config import Config
from megatron_gpc.errors import UserError
from megatron_gpc.types import Experts
from megatron_gpc.weights.families import family_of
from megatron_gpc.weights.fields import ModelFields
from megatron_gpc.weights.folders import is_converted, read_hf_config
from megatron_gpc.weights.hf_files import HFReader
from megatron_gpc.weights.places import places_of


def check_weights(model: Path) -> None:
    """Hold the weights' headers to the model's configuration; reads no weights.

    Args:
        model: Hugging Face folder, or converted checkpoint.

    Raises:
        UserError: the configuration is not supported, or weights are missing or damaged.
    """
    hf = read_hf_config(model)
    family = family_of(hf)
    params = family.params(hf)
    if is_converted(model):
        from megatron_gpc.weights.megatron_files import MegatronReader  # its imports: a second

        MegatronReader(model).check(places_of(params, family.model_fields(hf)))
    else:
        HFReader(model).check(params, family.copies(hf))


def check_reference(config: Config, hf: Mapping[str, Any] | None) -> None:
    """Hold kl.reference to the model, if it is needed and not model.hf itself; reads no weights.

    Args:
        hf: the model's config.json; None if model.build has not made it yet.

    Raises:
        UserError: it is not there, of another architecture, or lacks weights.
    """
    folder = config.kl.reference
    if config.kl.coef == 0 or folder is None:
        return
    if not folder.is_dir():
        raise UserError(f"kl.reference: {folder} is not there; name the folder of a checkpoint")
    try:
        if hf is not None:
            found = read_hf_config(folder)
            _check_same(folder, *(family_of(one).model_fields(one) for one in (found, hf)))
        check_weights(folder)
    except UserError as error:
        raise UserError(f"kl.reference: {error}") from None


def replayed_experts(config: Config, hf: Mapping[str, Any] | None = None) -> Experts | None:
    """Those whose choice training takes from the rollout (train.routing_replay); None: it does not.

    Args:
        hf: the model's config.json, if it has been read.

    Raises:
        UserError: it should, but the model has no experts.
    """
    if not config.train.routing_replay:
        return None
    hf = read_hf_config(config.model.hf) if hf is None else hf
    experts = family_of(hf).model_fields(hf).experts
    if experts is None or not experts.layers:
        raise UserError(
            "train.routing_replay=true needs a mixture of experts, and model.hf: "
            f"{config.model.hf} has none; leave it out"
        )
    return experts


def _check_same(folder: Path, reference: ModelFields, model: ModelFields) -> None:
    there, here = (
        {**m.transformer, **m.gpt, **m.config_attributes, "vocab_size": m.vocab_size}
        for m in (reference, model)
    )
    differing = [
        f"{name} is {there.get(name)} and not {here.get(name)}"
        for name in sorted({**there, **here})
        if there.get(name) != here.get(name)
    ]
    if differing:
        raise UserError(
            f"{folder} is of another architecture than model.hf: {', '.join(differing[:3])}; name "
            "a checkpoint of the same one"
        )
