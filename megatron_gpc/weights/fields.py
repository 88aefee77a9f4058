"""config.json -> the fields that megatron-core builds the same model from.

transformers 4.5x writes `rope_theta`, `rope_scaling` and `torch_dtype`; 5.x writes
`rope_parameters` and `dtype`, and renames Qwen3-MoE's `num_experts` to `num_local_experts`.  Both
read the same here, as transformers 5 takes them.  A file that says one thing twice and differently
is refused: transformers prefers one of the two, other programs the other.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from megatron_gpc.errors import UserError
from megatron_gpc.types import Experts

_DTYPES = ("bfloat16", "float16", "float32")
_SPELLINGS = {"num_local_experts": "num_experts", "torch_dtype": "dtype"}
_NULL_IS_UNSET = {"attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim"}
"""Rope settings for which transformers takes null to mean absent; a null elsewhere is an error."""

_ROPE_KEYS = {
    "default": set(),
    "linear": {"factor"},
    "yarn": {
        "factor",
        "original_max_position_embeddings",
        "beta_fast",
        "beta_slow",
        "mscale",
        "mscale_all_dim",
        "attention_factor",
        "truncate",
    },
}
"""Rope types that megatron-core computes as transformers does, and what each may set."""
DEFAULT_THETA = 10000.0
"""The default of transformers, if neither place names one."""


@dataclass(frozen=True)
class ModelFields:
    """What megatron-core needs to build the model; nothing of it is for a user to retype."""

    transformer: dict[str, Any]
    """Fields of TransformerConfig, as plain values: `activation_func` is the string "silu"."""
    gpt: dict[str, Any]
    """Keyword arguments of GPTModel, but for the vocabulary and the sequence length below."""
    vocab_size: int
    """True size; pad it with `table.padded_vocab_size`."""
    max_position_embeddings: int
    """Longest sequence the model was made for (GPTModel's max_sequence_length) [tokens]."""
    qk_layernorm: bool
    """Norms on query and key heads; layer specs are chosen by it."""
    dtype: str | None
    """Type that the checkpoint says it is in ("bfloat16"); None if it does not say."""
    config_attributes: dict[str, Any] = field(default_factory=dict)
    """To be set on the TransformerConfig object once it exists: GPTModel reads yarn's settings from
    there, although the dataclass has no such fields."""
    notes: tuple[str, ...] = ()
    """What of config.json is deliberately not followed; a sentence each, for the user to see."""

    @property
    def experts(self) -> Experts | None:
        """None if no layer has any."""
        count, layers = self.transformer.get("num_moe_experts"), self.transformer["num_layers"]
        if count is None:
            return None
        sparse = self.transformer["moe_layer_freq"]
        with_experts = [n for n in range(layers) if sparse == 1 or sparse[n]]
        return Experts(count, self.transformer["moe_router_topk"], tuple(with_experts), layers)


def normalise(
    hf_config: Mapping[str, Any],
    defaults: Mapping[str, Any],
    nulls: Mapping[str, Any],
    no_nulls: Collection[str],
) -> dict[str, Any]:
    """One spelling for both generations of config.json; absent keys take defaults, and nulls that
    say nothing are left out.

    Args:
        defaults: what transformers takes for absent keys.
        nulls: keys among them that may be null -> what null stands for; a string is another key.
        no_nulls: keys besides `defaults` that transformers does not take null for.

    Raises:
        UserError: two spellings of one setting that differ, or a null that transformers refuses.
    """
    refuse_two_spellings(hf_config)
    config = {**defaults}
    for key, value in hf_config.items():
        if value is not None:
            config[_spelling(key, hf_config)] = value
        elif key in nulls:
            meant = nulls[key]
            config[key] = hf_config.get(meant) if isinstance(meant, str) else meant
        elif key in defaults or key in no_nulls:
            raise UserError(f"config.json: {key} is null; give a value, or leave the key out")
    return config


def _spelling(key: str, hf_config: Mapping[str, Any]) -> str:
    """Today's name of a key.  transformers has Qwen3-MoE's experts under both, Qwen2-MoE's not."""
    if key == "num_local_experts" and hf_config.get("model_type") != "qwen3_moe":
        return key
    return _SPELLINGS.get(key, key)


def refuse_two_spellings(hf_config: Mapping[str, Any]) -> None:
    """Hold a config.json that says one thing in two places to saying the same.

    Raises:
        UserError: names both spellings and their values.
    """
    for old, new in _SPELLINGS.items():
        _same(new, hf_config.get(new), old, hf_config.get(old))
    experts = {
        key: hf_config[key] for key in ("num_experts", "num_local_experts") if key in hf_config
    }
    if len(experts) == 2 and None in experts.values():  # transformers takes the null
        raise UserError(
            f"config.json: of num_experts={experts['num_experts']} and "
            f"num_local_experts={experts['num_local_experts']}, two spellings of one "
            "setting, one is null; remove it"
        )
    rope_settings(hf_config)


def _same(name: str, value: Any, other_name: str, other: Any) -> None:
    if None not in (value, other) and value != other:
        raise UserError(
            f"config.json: {name}={value!r} and {other_name}={other!r} are two "
            "spellings of one setting and differ; remove the one that is wrong"
        )


def rope_settings(hf_config: Mapping[str, Any]) -> dict[str, Any]:
    """What config.json says of rotary embeddings, as transformers 5 puts it together: `rope_type`,
    `rope_theta`, and what else is given.

    `rope_scaling`, if it says anything, stands for `rope_parameters`; what stands beside them
    at the top level fills in what they lack.

    Raises:
        UserError: two spellings that differ, not one set of values for all layers, or a null.
    """
    found = {
        name: _rope_set(name, hf_config)
        for name in ("rope_scaling", "rope_parameters")
        if hf_config.get(name)
    }
    _same(
        "rope_parameters", found.get("rope_parameters"), "rope_scaling", found.get("rope_scaling")
    )
    return next(iter(found.values()), None) or _rope_set("rope_parameters", hf_config)


def _rope_set(name: str, hf_config: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of one of the two places, filled in from the top level."""
    given = hf_config.get(name) or {}
    if not isinstance(given, Mapping) or any(isinstance(v, Mapping) for v in given.values()):
        raise UserError(
            f"config.json: {name} must be one set of values for all layers, got {given!r}"
        )
    nulls = sorted(
        key for key, value in given.items() if value is None and key not in _NULL_IS_UNSET
    )
    if nulls:
        raise UserError(f"config.json: {name}.{nulls[0]} is null; give a value, or leave it out")
    settings = {key: value for key, value in given.items() if value is not None}
    kind = settings.pop("type", None)
    _same(f"{name}.rope_type", settings.get("rope_type"), f"{name}.type", kind)
    settings.setdefault("rope_type", kind or "default")
    beside = ["rope_theta", "partial_rotary_factor"]
    if settings["rope_type"] == "yarn":  # the one supported type that reads it
        beside.append("original_max_position_embeddings")
    for key in beside:
        value = hf_config.get(key)
        _same(f"{name}.{key}", settings.get(key), key, value)
        if value is not None:
            settings.setdefault(key, value)
    if "rope_theta" not in settings and "rope_theta" in hf_config:
        raise UserError("config.json: rope_theta is null; give a value, or leave the key out")
    settings.setdefault("rope_theta", DEFAULT_THETA)
    if settings["rope_type"] == "yarn" and "max_position_embeddings" in hf_config:
        settings.setdefault(
            "original_max_position_embeddings", hf_config["max_position_embeddings"]
        )
    return settings


def dtype(config: Mapping[str, Any]) -> str | None:
    """Type that the checkpoint says it is in; None if it does not say.

    Raises:
        UserError: transformers writes no such name, or a checkpoint cannot have it.
    """
    said = config.get("dtype")
    if said is not None and said not in _DTYPES:
        raise UserError(
            f"config.json: dtype={said!r:.80}: expected {', '.join(_DTYPES)}; or leave the key out"
        )
    return said


def whole_number(config: Mapping[str, Any], key: str, most: int = 2**31 - 1) -> int:
    """A positive integer of config.json, `most` at most.

    Raises:
        UserError: absent or something else.
    """
    return _positive(config, key, int, "whole number", most)


def positive_number(config: Mapping[str, Any], key: str) -> float:
    """A positive finite number of config.json.

    Raises:
        UserError: absent or something else.
    """
    return _positive(config, key, (int, float), "number", 1e15)


def _positive(config: Mapping[str, Any], key: str, kind: Any, words: str, most: float) -> Any:
    value = config.get(key)
    if value is None:
        raise UserError(f"config.json lacks {key}")
    if not isinstance(value, kind) or isinstance(value, bool) or not 0 < value <= most:
        raise UserError(
            f"config.json: {key} must be a positive {words}, got {value!r:.80} (most: {most:.10g})"
        )
    return value


def flag(config: Mapping[str, Any], key: str) -> bool:
    """true or false in config.json.

    Raises:
        UserError: absent or something else.
    """
    value = config.get(key)
    if not isinstance(value, bool):
        raise UserError(f"config.json: {key} must be true or false, got {value!r}")
    return value


def items(config: Mapping[str, Any], key: str) -> Sequence[Any]:
    """A list from config.json; empty if it is absent.

    Raises:
        UserError: something else.
    """
    value = config.get(key, ())
    if not isinstance(value, list | tuple):
        raise UserError(f"config.json: {key} must be a list, got {value!r}")
    return value


def refuse_unsupported(config: Mapping[str, Any], fixed: Mapping[str, Any]) -> None:
    """Hold the settings that megatron-core cannot follow to the one value that it can.

    Args:
        fixed: the family's setting -> the only value that is supported.

    Raises:
        UserError: names the setting.
    """
    for key, only in fixed.items():
        if key in config and config[key] != only:
            raise UserError(f"config.json: {key}={config[key]!r} is not supported, only {only!r}")
    if config.get("use_sliding_window", False):
        raise UserError(
            "config.json: use_sliding_window=true is not supported; set it to false if every "
            f"sequence is shorter than sliding_window={config.get('sliding_window')}"
        )
    other = sorted({str(kind) for kind in items(config, "layer_types")} - {"full_attention"})
    if other:
        raise UserError(
            f"config.json: layer_types {', '.join(other)} not supported, only full_attention"
        )
    kinds, layers = items(config, "layer_types"), config.get("num_hidden_layers")
    if kinds and len(kinds) != layers:
        raise UserError(
            f"config.json: layer_types has {len(kinds)} entries for num_hidden_layers="
            f"{str(layers)[:60]}"
        )
    if "per_layer_config" in config:
        raise UserError("config.json: per_layer_config (layers that differ) is not supported")
    if "quantization_config" in config:
        raise UserError(
            "config.json: quantization_config: quantized checkpoints are not "
            "supported; start from the bfloat16 one"
        )


def rope(config: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Rotary embedding: GPTModel's keyword arguments, and attributes for the TransformerConfig.

    Raises:
        UserError: a rope type or setting that megatron-core computes otherwise, or not at all.
    """
    settings = rope_settings(config)
    theta = positive_number(settings, "rope_theta")
    kind = settings["rope_type"]
    if not isinstance(kind, str) or kind not in _ROPE_KEYS:
        raise UserError(
            f"config.json: rope type {kind!r} is not supported, only {', '.join(_ROPE_KEYS)}"
        )
    if settings.pop("partial_rotary_factor", 1.0) != 1.0:
        raise UserError("config.json: partial_rotary_factor is not supported, only 1.0")
    unknown = sorted(set(settings) - _ROPE_KEYS[kind] - {"rope_theta", "rope_type"})
    if unknown:
        raise UserError(
            f"config.json: rope setting {unknown[0]} is not supported for rope type {kind!r}"
        )
    gpt = {"position_embedding_type": "rope", "rotary_base": theta, "rotary_percent": 1.0}
    if kind == "linear":
        gpt["seq_len_interpolation_factor"] = positive_number(settings, "factor")
    if kind == "yarn":
        gpt["position_embedding_type"] = "yarn"
        return gpt, _yarn(settings)
    return gpt, {}


def _yarn(settings: Mapping[str, Any]) -> dict[str, Any]:
    """transformers' names (modeling_rope_utils, `_compute_yarn_parameters`) -> megatron-core's.

    Both scale cos and sin by m(mscale) / m(mscale_all_dim), m(x) = 0.1 x ln(factor) + 1, or by
    m(1) if those are unset.  transformers alone takes that ratio as `attention_factor`; m solved
    for x says the same to megatron-core.
    """
    factor = positive_number(settings, "factor")
    for key in ("beta_fast", "beta_slow", "mscale", "mscale_all_dim"):
        if settings.get(key):
            positive_number(settings, key)
    mscale, mscale_all_dim = settings.get("mscale"), settings.get("mscale_all_dim")
    if not (mscale and mscale_all_dim):
        mscale = mscale_all_dim = None
    if "attention_factor" in settings:
        if factor <= 1:
            raise UserError("config.json: rope setting attention_factor needs factor > 1")
        mscale = (positive_number(settings, "attention_factor") - 1) / (0.1 * math.log(factor))
        mscale_all_dim = 0.0
    return {
        "yarn_rotary_scaling_factor": factor,
        "yarn_original_max_position_embeddings": whole_number(
            settings, "original_max_position_embeddings"
        ),
        "yarn_beta_fast": settings.get("beta_fast") or 32.0,
        "yarn_beta_slow": settings.get("beta_slow") or 1.0,
        "yarn_mscale": mscale,
        "yarn_mscale_all_dim": mscale_all_dim,
        "yarn_correction_range_round_to_int": settings.get("truncate", True),
    }
