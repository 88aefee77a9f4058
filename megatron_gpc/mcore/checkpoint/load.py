"""The weights that a run starts from, or is compared with."""

from __future__ import annotations

from pathlib import Path

from megatron_gpc.mcore.checkpoint.state import load_weights
from megatron_gpc.mcore.policy import Policy
from megatron_gpc.mcore.weights import load_hf
from megatron_gpc.run.say import say
from megatron_gpc.weights import family_of, places_of
from megatron_gpc.weights.folders import is_converted, read_hf_config


def load_folder(policy: Policy, folder: Path) -> None:
    """Put a Hugging Face folder's weights, or a converted one's, into the policy's network; every
    rank calls it.

    Raises:
        UserError: they are damaged, or not those of model.hf's architecture.
    """
    say(f"reading the weights of {folder}")
    hf = read_hf_config(policy.config.model.hf)
    family = family_of(hf)
    params = family.params(hf, policy.config.parallel.tp)
    if is_converted(folder):
        load_weights(folder, policy.models, places_of(params, family.model_fields(hf)))
    else:
        load_hf(policy.models, params, folder, family.copies(hf))
