"""Which parameters a model has: one immutable table per Hugging Face `model_type`.

A new dense family is one more `Family` at the end of this file and no new code.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from megatron_gpc.errors import UserError
from megatron_gpc.weights import fields
from megatron_gpc.weights.fields import ModelFields
from megatron_gpc.weights.table import Kind, Param, padded_vocab_size

Where = Literal["model", "layer", "dense", "moe", "expert"]
"""Once a model; in every layer; in dense layers; in mixture-of-experts layers; once an expert."""

_ATTN, _MLP = "decoder.layers.{layer}.self_attention", "decoder.layers.{layer}.mlp"
_HF = "model.layers.{layer}"

MOST_LAYERS = 1024
"""Of a model; and most experts of a layer."""


@dataclass(frozen=True)
class Rule:
    """A row of a table: one Megatron parameter, or one in each layer or expert."""

    where: Where
    megatron: str
    hf: tuple[str, ...]
    shapes: tuple[str, ...]
    """HF shapes in the words of `Family._sizes`: "q hidden" is [heads * head_dim, hidden_size]."""
    kind: Kind = "copy"
    split_dim: int | None = None
    when: str | None = None
    """Setting of config.json that must be true for the parameter to exist."""
    unless: str | None = None
    """Setting of config.json that must be false for the parameter to exist."""


# fmt: off
# A rule a line or two: the tables are read as tables.
def _mlp(where: Where, megatron: str, hf: str, width: str) -> tuple[Rule, Rule]:
    """A gated feed-forward block of `width`."""
    return (
        Rule(where, f"{megatron}.linear_fc1.weight",
             (f"{hf}.gate_proj.weight", f"{hf}.up_proj.weight"),
             (f"{width} hidden",) * 2, "gate_up", 0),
        Rule(where, f"{megatron}.linear_fc2.weight", (f"{hf}.down_proj.weight",),
             (f"hidden {width}",), split_dim=1),
    )


def _qkv(suffix: str, tail: str, when: str | None = None) -> Rule:
    return Rule("layer", f"{_ATTN}.linear_qkv.{suffix}",
                tuple(f"{_HF}.self_attn.{part}_proj.{suffix}" for part in "qkv"),
                (f"q{tail}", f"kv{tail}", f"kv{tail}"), "qkv", 0, when)


_BODY = (
    Rule("model", "embedding.word_embeddings.weight", ("model.embed_tokens.weight",),
         ("vocab hidden",), "vocab", 0),
    Rule("model", "decoder.final_layernorm.weight", ("model.norm.weight",), ("hidden",)),
    Rule("model", "output_layer.weight", ("lm_head.weight",), ("vocab hidden",), "vocab", 0,
         unless="tie_word_embeddings"),
    Rule("layer", f"{_ATTN}.linear_qkv.layer_norm_weight", (f"{_HF}.input_layernorm.weight",),
         ("hidden",)),
    _qkv("weight", " hidden"),
    Rule("layer", f"{_ATTN}.linear_proj.weight", (f"{_HF}.self_attn.o_proj.weight",),
         ("hidden q",), split_dim=1),
)
_QKV_BIAS = _qkv("bias", "")
_QK_NORM = tuple(
    Rule("layer", f"{_ATTN}.{part}_layernorm.weight", (f"{_HF}.self_attn.{part}_norm.weight",),
         ("head_dim",)) for part in "qk")
_DENSE = (
    Rule("dense", f"{_MLP}.linear_fc1.layer_norm_weight",
         (f"{_HF}.post_attention_layernorm.weight",), ("hidden",)),
    *_mlp("dense", _MLP, f"{_HF}.mlp", "ffn"),
)
_MOE = (
    Rule("moe", "decoder.layers.{layer}.pre_mlp_layernorm.weight",
         (f"{_HF}.post_attention_layernorm.weight",), ("hidden",)),
    Rule("moe", f"{_MLP}.router.weight", (f"{_HF}.mlp.gate.weight",), ("experts hidden",)),
    *_mlp("expert", _MLP + ".experts.local_experts.{expert}", f"{_HF}.mlp.experts.{{expert}}",
          "expert_ffn"),
)
_SHARED_EXPERT = (
    *_mlp("moe", f"{_MLP}.shared_experts", f"{_HF}.mlp.shared_expert", "shared_ffn"),
    Rule("moe", f"{_MLP}.shared_experts.gate_weight", (f"{_HF}.mlp.shared_expert_gate.weight",),
         ("one hidden",)),
)
# fmt: on


@dataclass(frozen=True)
class Family:
    """Everything that conversion and weight sync know of one model_type."""

    model_type: str
    rules: tuple[Rule, ...]
    defaults: Mapping[str, Any]
    """What transformers takes for settings that a config.json may leave out."""
    fixed: Mapping[str, Any]
    """Settings and the only value of each that is supported; others are refused by name."""
    nulls: Mapping[str, Any]
    """Settings that may be null -> what transformers takes null for; a string names a setting."""

    def params(self, hf_config: Mapping[str, Any], tp: int = 1) -> tuple[Param, ...]:
        """Every parameter of the model: model-wide ones, then layer by layer.

        Args:
            hf_config: content of config.json.
            tp: tensor parallelism; it matters to the vocabulary's padding alone, and there only
                if it does not divide 128.

        Raises:
            UserError: a setting is missing, wrong or unsupported.
        """
        config = self._settings(hf_config)
        sizes = self._sizes(config)
        sparse = self._sparse_layers(config)
        found = [_param(rule, sizes, tp) for rule in self._present(config, "model")]
        for layer, is_sparse in enumerate(sparse):
            once = self._present(config, "layer", "moe" if is_sparse else "dense")
            found += [_param(rule, sizes, tp, layer) for rule in once]
            found += [
                _param(rule, sizes, tp, layer, expert)
                for expert in range(sizes["experts"] if is_sparse else 0)
                for rule in self._present(config, "expert")
            ]
        return tuple(found)

    def model_fields(self, hf_config: Mapping[str, Any]) -> ModelFields:
        """What megatron-core builds the same model from.

        Raises:
            UserError: a setting is missing, wrong or unsupported.
        """
        config = self._settings(hf_config)
        sizes = self._sizes(config)
        qk_layernorm = any(rule.megatron.endswith("q_layernorm.weight") for rule in self.rules)
        rotary, attributes = fields.rope(config)
        transformer = {
            "num_layers": fields.whole_number(config, "num_hidden_layers", most=MOST_LAYERS),
            "hidden_size": sizes["hidden"],
            "ffn_hidden_size": sizes["ffn"],
            "num_attention_heads": fields.whole_number(config, "num_attention_heads"),
            "num_query_groups": sizes["groups"],
            "kv_channels": sizes["head_dim"],
            "normalization": "RMSNorm",
            "layernorm_epsilon": fields.positive_number(config, "rms_norm_eps"),
            "gated_linear_unit": True,
            "activation_func": "silu",
            "add_bias_linear": False,
            "add_qkv_bias": any(
                r.megatron.endswith("qkv.bias") for r in self._present(config, "layer")
            ),
            "qk_layernorm": qk_layernorm,
            "attention_dropout": 0.0,
            "hidden_dropout": 0.0,
        }
        if "experts" in sizes:
            transformer |= self._expert_fields(config, sizes)
        notes = ()
        if config.get("attention_dropout", 0.0):
            notes = (
                f"attention_dropout={config['attention_dropout']} of config.json is not "
                "applied: the policy is trained as it is sampled, without dropout",
            )
        return ModelFields(
            transformer=transformer,
            gpt={
                "share_embeddings_and_output_weights": fields.flag(config, "tie_word_embeddings"),
                **rotary,
            },
            vocab_size=_with_eos(config, sizes["vocab"]),
            max_position_embeddings=fields.whole_number(config, "max_position_embeddings"),
            qk_layernorm=qk_layernorm,
            dtype=fields.dtype(config),
            config_attributes=attributes,
            notes=notes,
        )

    def copies(self, hf_config: Mapping[str, Any]) -> dict[str, str]:
        """HF tensors that a checkpoint may hold a second time -> the tensor they must equal.

        Tied models have no output layer of their own, but some tools write `lm_head.weight` anyway.
        """
        config = self._settings(hf_config)
        absent = [
            rule
            for rule in self.rules
            if rule.unless == "tie_word_embeddings" and config[rule.unless]
        ]
        return {rule.hf[0]: "model.embed_tokens.weight" for rule in absent}

    def _sizes(self, config: Mapping[str, Any]) -> dict[str, int]:
        """The words that shapes are written in -> numbers.

        Raises:
            UserError: a size is missing, or heads do not divide.
        """
        hidden = fields.whole_number(config, "hidden_size")
        heads = fields.whole_number(config, "num_attention_heads")
        groups = fields.whole_number(config, "num_key_value_heads")
        if heads % groups:
            raise UserError(
                f"config.json: num_key_value_heads={groups} does not divide "
                f"num_attention_heads={heads}"
            )
        if "head_dim" in config:
            head_dim = fields.whole_number(config, "head_dim")
        elif hidden % heads:
            raise UserError(
                f"config.json: num_attention_heads={heads} does not divide hidden_size={hidden}"
            )
        else:
            head_dim = hidden // heads
        sizes = {
            "hidden": hidden,
            "head_dim": head_dim,
            "groups": groups,
            "q": heads * head_dim,
            "kv": groups * head_dim,
            "ffn": fields.whole_number(config, "intermediate_size"),
            "vocab": fields.whole_number(config, "vocab_size"),
            "one": 1,
        }
        words = {word for rule in self.rules for shape in rule.shapes for word in shape.split()}
        for word, key in (
            ("experts", "num_experts"),
            ("expert_ffn", "moe_intermediate_size"),
            ("shared_ffn", "shared_expert_intermediate_size"),
        ):
            if word in words:
                most = MOST_LAYERS if word == "experts" else 2**31 - 1
                sizes[word] = fields.whole_number(config, key, most)
        return sizes

    def _settings(self, hf_config: Mapping[str, Any]) -> dict[str, Any]:
        no_nulls = {*self.fixed, "head_dim", "use_sliding_window"}
        config = fields.normalise(hf_config, self.defaults, self.nulls, no_nulls)
        fields.refuse_unsupported(config, self.fixed)
        return config

    def _present(self, config: Mapping[str, Any], *where: Where) -> Iterator[Rule]:
        for rule in self.rules:
            wanted = rule.when is None or fields.flag(config, rule.when)
            hidden = rule.unless is not None and fields.flag(config, rule.unless)
            if rule.where in where and wanted and not hidden:
                yield rule

    def _sparse_layers(self, config: Mapping[str, Any]) -> tuple[bool, ...]:
        """Whether each layer is a mixture of experts (transformers, Qwen2MoeDecoderLayer)."""
        layers = fields.whole_number(config, "num_hidden_layers", most=MOST_LAYERS)
        if not any(rule.where == "moe" for rule in self.rules):
            return (False,) * layers
        step = fields.whole_number(config, "decoder_sparse_step")
        dense = fields.items(config, "mlp_only_layers")
        return tuple(layer not in dense and (layer + 1) % step == 0 for layer in range(layers))

    def _expert_fields(self, config: Mapping[str, Any], sizes: Mapping[str, int]) -> dict[str, Any]:
        topk = fields.whole_number(config, "num_experts_per_tok")
        normalised = fields.flag(config, "norm_topk_prob")
        if topk > sizes["experts"]:
            raise UserError(
                f"config.json: num_experts_per_tok={topk} is more than "
                f"num_experts={sizes['experts']}"
            )
        if topk == 1 and normalised:
            raise UserError(
                "config.json: num_experts_per_tok=1 with norm_topk_prob=true is not "
                "supported: every weight is 1 and the router gets no gradient"
            )
        sparse = self._sparse_layers(config)
        found = {
            "num_moe_experts": sizes["experts"],
            "moe_ffn_hidden_size": sizes["expert_ffn"],
            # a plain 1 keeps megatron-core's checkpoint layout of equal layers
            "moe_layer_freq": 1 if all(sparse) else [int(is_sparse) for is_sparse in sparse],
            "moe_router_topk": topk,
            # normalised: a softmax over the chosen experts alone says the same
            "moe_router_pre_softmax": not normalised,
            "moe_router_score_function": "softmax",
            # bf16 logits tie, and trainer and server would then choose different experts
            "moe_router_dtype": "fp32",
            "moe_router_load_balancing_type": "none",
            "moe_aux_loss_coeff": 0.0,
        }
        if "shared_ffn" in sizes:
            found["moe_shared_expert_intermediate_size"] = sizes["shared_ffn"]
            found["moe_shared_expert_gate"] = True
        return found


def _with_eos(config: Mapping[str, Any], vocab_size: int) -> int:
    """The vocabulary's size; refuses a config.json whose end tokens are not in it."""
    eos = config.get("eos_token_id")
    for token in eos if isinstance(eos, list) else [] if eos is None else [eos]:
        if type(token) is not int or not 0 <= token < vocab_size:
            raise UserError(
                f"config.json: eos_token_id={eos!r:.80}: expected token numbers from 0 to "
                f"{vocab_size - 1} (vocab_size={vocab_size})"
            )
    return vocab_size


def _param(
    rule: Rule,
    sizes: Mapping[str, int],
    tp: int,
    layer: int | None = None,
    expert: int | None = None,
) -> Param:
    hf_shapes = tuple(tuple(sizes[word] for word in shape.split()) for shape in rule.shapes)
    rows = sum(shape[0] for shape in hf_shapes)
    if rule.kind == "vocab":
        rows = padded_vocab_size(rows, tp)
    return Param(
        megatron=rule.megatron.format(layer=layer, expert=expert),
        hf=tuple(name.format(layer=layer, expert=expert) for name in rule.hf),
        hf_shapes=hf_shapes,
        shape=(rows, *hf_shapes[0][1:]),
        kind=rule.kind,
        split_dim=rule.split_dim,
        layer=layer,
        expert=expert,
        groups=sizes["groups"] if rule.kind == "qkv" else 0,
    )


_DEFAULTS = {"tie_word_embeddings": False, "rms_norm_eps": 1e-6}
_DENSE_DEFAULTS = {**_DEFAULTS, "num_key_value_heads": 32}
_MOE_DEFAULTS = {
    **_DEFAULTS, "decoder_sparse_step": 1, "mlp_only_layers": (), "norm_topk_prob": False
}  # fmt: skip
_FIXED = {"hidden_act": "silu"}
_FIXED_QWEN3 = {**_FIXED, "attention_bias": False}
_DENSE_NULLS = {"num_key_value_heads": "num_attention_heads"}
_MOE_NULLS = {"mlp_only_layers": ()}

FAMILIES: Mapping[str, Family] = {
    family.model_type: family
    for family in (
        Family(  # Qwen2, Qwen2.5, Qwen2.5-Math, Qwen2.5-Coder
            "qwen2",
            (*_BODY, _QKV_BIAS, *_DENSE),
            _DENSE_DEFAULTS,
            _FIXED,
            _DENSE_NULLS,
        ),
        Family(
            "qwen3",
            (*_BODY, *_QK_NORM, *_DENSE),
            {**_DENSE_DEFAULTS, "head_dim": 128},
            _FIXED_QWEN3,
            _DENSE_NULLS,
        ),
        Family(  # Qwen1.5-MoE, Qwen2-57B-A14B
            "qwen2_moe",
            (*_BODY, _qkv("bias", "", when="qkv_bias"), *_DENSE, *_MOE, *_SHARED_EXPERT),
            {**_MOE_DEFAULTS, "qkv_bias": True, "num_key_value_heads": 16},
            _FIXED,
            _MOE_NULLS,
        ),
        Family(
            "qwen3_moe",
            (*_BODY, *_QK_NORM, *_DENSE, *_MOE),
            {**_MOE_DEFAULTS, "num_key_value_heads": 4},
            _FIXED_QWEN3,
            _MOE_NULLS,
        ),
    )
}


def family_of(hf_config: Mapping[str, Any]) -> Family:
    """The family of a checkpoint, by config.json's model_type.

    Raises:
        UserError: lists the model types that are supported.
    """
    model_type = hf_config.get("model_type")
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise UserError(
            f"config.json: model_type={model_type!r} is not supported; supported are "
            f"{', '.join(FAMILIES)}"
        )
    return FAMILIES[model_type]
