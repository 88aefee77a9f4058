"""config.json is read the same from every transformers version, and refused by field name."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tiny_models import MODELS, Checkpoint, Checkpoints
from transformers.models.qwen2.modeling_qwen2 import Qwen2RotaryEmbedding

from megatron_gpc.errors import UserError
from megatron_gpc.weights import FAMILIES, family_of

QWEN2: dict[str, Any] = {
    # Qwen2.5-Math-1.5B as its config.json on the hub is (transformers 4.44)
    "architectures": ["Qwen2ForCausalLM"],
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "eos_token_id": 151643,
    "hidden_act": "silu",
    "hidden_size": 1536,
    "initializer_range": 0.02,
    "intermediate_size": 8960,
    "max_position_embeddings": 4096,
    "max_window_layers": 21,
    "model_type": "qwen2",
    "num_attention_heads": 12,
    "num_hidden_layers": 28,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-06,
    "rope_theta": 10000,
    "sliding_window": 4096,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.44.0",
    "use_cache": True,
    "use_mrope": False,
    "use_sliding_window": False,
    "vocab_size": 151936,
}
QWEN3_MOE: dict[str, Any] = {
    # Qwen3-30B-A3B (transformers 4.51)
    "architectures": ["Qwen3MoeForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "decoder_sparse_step": 1,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "max_position_embeddings": 40960,
    "max_window_layers": 48,
    "mlp_only_layers": [],
    "model_type": "qwen3_moe",
    "moe_intermediate_size": 768,
    "norm_topk_prob": True,
    "num_attention_heads": 32,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 48,
    "num_key_value_heads": 4,
    "output_router_logits": False,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000.0,
    "router_aux_loss_coef": 0.001,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "use_sliding_window": False,
    "vocab_size": 151936,
}
TINY = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 64,
    "max_position_embeddings": 64,
    "moe_intermediate_size": 16,
    "num_experts_per_tok": 2,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 4096}


def rewritten(config: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The same model's config.json as the installed transformers writes it."""
    (folder / "config.json").write_text(json.dumps(config))
    transformers.AutoConfig.from_pretrained(folder).save_pretrained(folder)
    return json.loads((folder / "config.json").read_text())


@pytest.mark.parametrize(
    "config",
    [
        QWEN2,
        QWEN3_MOE,
        {**QWEN2, "rope_scaling": YARN},
        {
            **QWEN2,
            "rope_scaling": {
                "type": "yarn",
                "factor": 4.0,
                "original_max_position_embeddings": 4096,
            },
        },
    ],
    ids=["qwen2", "qwen3_moe", "yarn", "yarn-old-key"],
)
def test_both_generations_of_transformers_read_the_same(
    config: dict[str, Any], tmp_path: Path
) -> None:
    new = rewritten(config, tmp_path)
    if transformers.__version__.startswith("5."):
        assert "rope_parameters" in new and "rope_theta" not in new and "torch_dtype" not in new
    family = family_of(config)
    assert family.model_fields(config) == family.model_fields(new)
    assert family.params(config) == family.params(new)


def test_a_config_with_only_what_differs_from_defaults_reads_the_same() -> None:
    left_out = (
        "hidden_act",
        "rms_norm_eps",
        "rope_theta",
        "attention_dropout",
        "sliding_window",
        "use_sliding_window",
        "max_window_layers",
    )
    short = {key: value for key, value in QWEN2.items() if key not in left_out}
    family = family_of(QWEN2)
    assert family.model_fields(short) == family.model_fields(QWEN2)


def test_defaults_are_those_of_transformers() -> None:
    names = {
        "qwen2": "Qwen2Config",
        "qwen3": "Qwen3Config",
        "qwen2_moe": "Qwen2MoeConfig",
        "qwen3_moe": "Qwen3MoeConfig",
    }
    assert names.keys() == FAMILIES.keys()
    for model_type, name in names.items():
        theirs = getattr(transformers, name)()
        for key, value in FAMILIES[model_type].defaults.items():
            if key == "rope_theta":
                assert theirs.rope_parameters["rope_theta"] == value
            else:
                assert getattr(theirs, key) == (list(value) if isinstance(value, tuple) else value)


def test_tables_name_exactly_the_tensors_of_the_checkpoint(checkpoint: Checkpoint) -> None:
    params = family_of(checkpoint.config).params(checkpoint.config)
    listed = {
        name: shape
        for param in params
        for name, shape in zip(param.hf, param.hf_shapes, strict=True)
    }
    real = {name: tuple(tensor.shape) for name, tensor in checkpoint.tensors().items()}
    assert listed == real
    assert len({param.megatron for param in params}) == len(params)


def test_layers_and_experts_are_numbered_over_the_whole_model(checkpoints: Checkpoints) -> None:
    checkpoint = checkpoints["qwen3_moe-some-dense"]
    params = {p.megatron: p for p in family_of(checkpoint.config).params(checkpoint.config)}
    expert = params["decoder.layers.1.mlp.experts.local_experts.3.linear_fc2.weight"]
    assert (expert.layer, expert.expert) == (1, 3)
    assert expert.hf == ("model.layers.1.mlp.experts.3.down_proj.weight",)
    assert params["decoder.layers.0.mlp.linear_fc1.layer_norm_weight"].expert is None
    assert "decoder.layers.1.pre_mlp_layernorm.weight" in params
    assert params["decoder.final_layernorm.weight"].layer is None


def test_fields_of_qwen25_math() -> None:
    fields = family_of(QWEN2).model_fields(QWEN2)
    assert fields.transformer["kv_channels"] == 128
    assert fields.transformer["num_query_groups"] == 2
    assert fields.transformer["add_qkv_bias"] is True
    assert fields.transformer["activation_func"] == "silu"
    assert fields.gpt == {
        "share_embeddings_and_output_weights": True,
        "rotary_base": 10000,
        "position_embedding_type": "rope",
        "rotary_percent": 1.0,
    }
    assert (fields.vocab_size, fields.max_position_embeddings) == (151936, 4096)
    assert (fields.qk_layernorm, fields.dtype, fields.notes) == (False, "bfloat16", ())
    assert fields.config_attributes == {}


def test_fields_of_qwen3_moe() -> None:
    fields = family_of(QWEN3_MOE).model_fields(QWEN3_MOE)
    assert fields.qk_layernorm is True
    assert fields.transformer["moe_layer_freq"] == 1
    assert fields.transformer["moe_router_pre_softmax"] is False
    assert fields.transformer["num_moe_experts"] == 128
    mixed = {**QWEN3_MOE, "num_hidden_layers": 4, "decoder_sparse_step": 2, "mlp_only_layers": [3]}
    assert family_of(mixed).model_fields(mixed).transformer["moe_layer_freq"] == [0, 1, 0, 0]


def test_dropout_is_left_out_and_said_so() -> None:
    config = {**QWEN2, "attention_dropout": 0.1}
    fields = family_of(config).model_fields(config)
    assert fields.transformer["attention_dropout"] == 0.0
    assert "attention_dropout=0.1" in fields.notes[0]


def test_an_unknown_model_type_is_refused_with_those_supported() -> None:
    with pytest.raises(
        UserError,
        match="'llama' is not supported; supported are qwen2, qwen3, qwen2_moe, qwen3_moe",
    ):
        family_of({"model_type": "llama"})
    with pytest.raises(UserError, match="model_type=None"):
        family_of({})


@pytest.mark.parametrize(
    ("base", "change", "says"),
    [
        (QWEN2, {"hidden_size": None}, "lacks hidden_size"),
        (QWEN2, {"hidden_size": "1536"}, "hidden_size must be a positive whole number, got '1536'"),
        (QWEN2, {"vocab_size": 0}, "vocab_size must be a positive whole number"),
        (QWEN2, {"num_attention_heads": 7}, "num_key_value_heads=2 does not divide"),
        (QWEN2, {"hidden_size": 1537}, "num_attention_heads=12 does not divide hidden_size=1537"),
        (QWEN2, {"rms_norm_eps": -1.0}, "rms_norm_eps must be a positive number"),
        (QWEN2, {"tie_word_embeddings": "yes"}, "tie_word_embeddings must be true or false"),
        (QWEN2, {"hidden_act": "gelu"}, "hidden_act='gelu' is not supported, only 'silu'"),
        (QWEN2, {"use_sliding_window": True}, "use_sliding_window=true is not supported"),
        (
            QWEN2,
            {"layer_types": ["sliding_attention", "full_attention"]},
            "layer_types sliding_attention not supported",
        ),
        (QWEN2, {"quantization_config": {"quant_method": "awq"}}, "quantization_config"),
        (QWEN2, {"rope_theta": 0}, "rope_theta must be a positive number"),
        (
            QWEN2,
            {"rope_scaling": {"type": "dynamic", "factor": 2.0}},
            "rope type 'dynamic' is not supported, only default, linear, yarn",
        ),
        (QWEN2, {"rope_scaling": {"type": "linear"}}, "lacks factor"),
        (QWEN2, {"rope_scaling": {**YARN, "long_factor": [1.0]}}, "rope setting long_factor"),
        (
            QWEN2,
            {"rope_scaling": {**YARN, "factor": 1.0, "attention_factor": 1.2}},
            "attention_factor needs factor > 1",
        ),
        (
            QWEN2,
            {"rope_parameters": {"full_attention": {"rope_theta": 1e4}}},
            "rope_parameters must be one set of values",
        ),
        (
            QWEN2,
            {"rope_scaling": {"full_attention": {"rope_theta": 1e4}}},
            "rope_scaling must be one set of values",
        ),
        (QWEN2, {"partial_rotary_factor": 0.5}, "partial_rotary_factor is not supported"),
        (
            QWEN2,
            {"rope_parameters": {"rope_theta": 10000.0, "partial_rotary_factor": 0.5}},
            "partial_rotary_factor is not supported",
        ),
        (QWEN2, {"rms_norm_eps": None}, "rms_norm_eps is null"),
        (QWEN2, {"head_dim": None}, "head_dim is null"),
        (QWEN2, {"use_sliding_window": None}, "use_sliding_window is null"),
        (QWEN2, {"rope_theta": None}, "rope_theta is null"),
        (QWEN2, {"rope_parameters": {"rope_theta": None}}, "rope_parameters.rope_theta is null"),
        (
            QWEN2,
            {"rope_scaling": {"rope_type": None, "type": "linear", "factor": 2.0}},
            "rope_scaling.rope_type is null",
        ),
        (QWEN3_MOE, {"num_key_value_heads": None}, "num_key_value_heads is null"),
        (
            QWEN2,
            {"layer_types": ["full_attention"]},
            "layer_types has 1 entries for num_hidden_layers=28",
        ),
        (QWEN2, {"per_layer_config": {"1": {"hidden_size": 8}}}, "per_layer_config"),
        (
            QWEN2,
            {"rope_scaling": {"rope_type": "default", "partial_rotary_factor": 0.5}},
            "partial_rotary_factor is not supported",
        ),
        (QWEN3_MOE, {"attention_bias": True}, "attention_bias=True is not supported, only False"),
        (QWEN3_MOE, {"num_experts": None}, "lacks num_experts"),
        (QWEN3_MOE, {"num_experts_per_tok": 129}, "num_experts_per_tok=129 is more than"),
        (QWEN3_MOE, {"num_experts_per_tok": 1}, "num_experts_per_tok=1 with norm_topk_prob=true"),
        (QWEN3_MOE, {"decoder_sparse_step": 0}, "decoder_sparse_step must be a positive"),
        (QWEN3_MOE, {"mlp_only_layers": 3}, "mlp_only_layers must be a list, got 3"),
        (QWEN2, {"layer_types": 1}, "layer_types must be a list, got 1"),
    ],
)
def test_what_megatron_cannot_follow_is_refused_by_field(
    base: dict[str, Any], change: dict[str, Any], says: str
) -> None:
    config = {**base, **change}
    with pytest.raises(UserError) as refusal:
        family_of(config).params(config)
        family_of(config).model_fields(config)
    assert says in str(refusal.value)


@pytest.mark.parametrize(
    ("base", "change", "says"),
    [
        (QWEN2, {"dtype": "float32"}, "dtype='float32' and torch_dtype='bfloat16'"),
        (QWEN3_MOE, {"num_local_experts": 64}, "num_experts=128 and num_local_experts=64"),
        (QWEN3_MOE, {"num_local_experts": None}, "num_experts=128 and num_local_experts=None"),
        (
            {**QWEN3_MOE, "model_type": "qwen2_moe"},
            {"num_local_experts": 64},
            "num_local_experts=64",
        ),
        (
            QWEN2,
            {"rope_parameters": {"rope_theta": 1e6}},
            "rope_parameters.rope_theta=1000000.0 and rope_theta=10000",
        ),
        (
            QWEN2,
            {"rope_scaling": {"type": "linear", "factor": 2.0, "rope_theta": 1e6}},
            "rope_scaling.rope_theta=1000000.0 and rope_theta=10000",
        ),
        (
            QWEN2,
            {"rope_scaling": {"type": "linear", "rope_type": "default"}},
            "rope_scaling.rope_type='default' and rope_scaling.type='linear'",
        ),
        (
            QWEN2,
            {"rope_scaling": YARN, "rope_parameters": {"rope_type": "default"}},
            "are two spellings of one setting and differ",
        ),
        (
            QWEN2,
            {"rope_scaling": YARN, "rope_parameters": {**YARN, "factor": 2.0}},
            "'factor': 2.0",
        ),
        (
            QWEN2,
            {"rope_scaling": YARN, "original_max_position_embeddings": 8192},
            "original_max_position_embeddings=4096 and original_max_position_embeddings=8192",
        ),
        (
            QWEN2,
            {"rope_parameters": {"partial_rotary_factor": 0.5}, "partial_rotary_factor": 0.25},
            "rope_parameters.partial_rotary_factor=0.5 and partial_rotary_factor=0.25",
        ),
    ],
)
def test_two_spellings_that_differ_are_refused_with_both(
    base: dict[str, Any], change: dict[str, Any], says: str
) -> None:
    config = {**base, **change}
    for read in (family_of(config).params, family_of(config).model_fields):
        with pytest.raises(UserError, match="config.json: ") as refusal:
            read(config)
        assert says in str(refusal.value) and "\n" not in str(refusal.value)


LINEAR = {"type": "linear", "factor": 2.0}


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"rope_theta": 5e5},
        {"rope_parameters": {"rope_theta": 5e5}},
        {"rope_theta": 5e5, "rope_parameters": {"rope_theta": 5e5}},
        {"rope_theta": None, "rope_parameters": {"rope_theta": 5e5}},
        {"rope_theta": 5e5, "rope_parameters": None},
        {"rope_theta": 5e5, "rope_parameters": {}},
        {"rope_theta": 5e5, "rope_scaling": {}},
        {"rope_scaling": LINEAR},
        {"rope_scaling": LINEAR, "rope_theta": 5e5},
        {"rope_parameters": LINEAR, "rope_theta": 5e5},
        {"rope_scaling": {**LINEAR, "rope_type": "linear"}, "rope_parameters": {}},
        {"rope_scaling": None, "rope_parameters": {"rope_type": "linear", "factor": 3.0}},
        {"rope_scaling": {}, "rope_parameters": {"rope_type": "linear", "factor": 3.0}},
        {
            "rope_scaling": LINEAR,
            "rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0},
        },
        {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}},
        {
            "rope_scaling": {"rope_type": "yarn", "factor": 4.0, "beta_fast": None, "beta_slow": 0},
            "original_max_position_embeddings": 32,
        },
        {
            "rope_parameters": {
                **YARN,
                "attention_factor": None,
                "truncate": False,
                "rope_theta": 5e5,
            }
        },
        {"rope_parameters": {**YARN, "mscale": 1.0, "mscale_all_dim": 0.5}},
        {"original_max_position_embeddings": 32},
        {"partial_rotary_factor": 1.0},
        {"rope_parameters": {"partial_rotary_factor": 1.0}, "partial_rotary_factor": 1.0},
        {"torch_dtype": "float16"},
        {"dtype": "float16"},
        {"dtype": None, "torch_dtype": "float16"},
        {"dtype": "float16", "torch_dtype": "float16"},
        {"num_key_value_heads": None},
        {"head_dim": 16},
        {"tie_word_embeddings": True},
        {"layer_types": None},
        {"layer_types": ["full_attention"] * 2},
        {"num_local_experts": 8},
        {"num_experts": 8},
        {"num_experts": 8, "num_local_experts": 8},
        {"mlp_only_layers": None},
    ],
    ids=str,
)
def test_every_spelling_means_what_transformers_makes_of_it(change: dict[str, Any]) -> None:
    """Held to transformers' own objects: config, and rotary embedding, which reads it again."""
    experts = "experts" in str(change) or "mlp_only" in str(change)
    config = {"model_type": "qwen3_moe" if experts else "qwen2", **TINY, **change}
    if experts and "experts" not in str(change):
        config["num_experts"] = 8
    fields = family_of(config).model_fields(config)
    theirs = transformers.CONFIG_MAPPING[config["model_type"]].from_dict(copy.deepcopy(config))
    rotary = Qwen2RotaryEmbedding(theirs)
    assert theirs.rope_parameters["rope_theta"] == fields.gpt["rotary_base"]
    kind = theirs.rope_parameters["rope_type"]
    assert fields.gpt["position_embedding_type"] == ("yarn" if kind == "yarn" else "rope")
    factor = theirs.rope_parameters["factor"] if kind == "linear" else None
    assert fields.gpt.get("seq_len_interpolation_factor") == factor
    if kind == "yarn":
        said, taken = theirs.rope_parameters, fields.config_attributes
        for name, default in (
            ("beta_fast", 32),
            ("beta_slow", 1),
            ("factor", None),
            ("original_max_position_embeddings", None),
        ):
            ours = taken[f"yarn_{name.replace('factor', 'rotary_scaling_factor')}"]
            assert ours == (said.get(name) or default), name
        assert taken["yarn_correction_range_round_to_int"] == said.get("truncate", True)
        m, m_all = taken["yarn_mscale"], taken["yarn_mscale_all_dim"]
        growth = 0.1 * math.log(said["factor"])
        scale = (m * growth + 1) / (m_all * growth + 1) if m is not None else growth + 1
        assert scale == pytest.approx(rotary.attention_scaling)
    assert fields.dtype == (theirs.dtype and str(theirs.dtype).removeprefix("torch."))
    assert fields.gpt["share_embeddings_and_output_weights"] == theirs.tie_word_embeddings
    ours = fields.transformer
    assert ours["num_query_groups"] == theirs.num_key_value_heads
    assert ours["kv_channels"] == getattr(theirs, "head_dim", 32 // 4)
    assert ours.get("num_moe_experts") == getattr(theirs, "num_experts", None)


def test_heads_that_are_left_out_are_as_many_as_transformers_takes() -> None:
    config = {"model_type": "qwen3_moe", **TINY, "num_experts": 8, "num_attention_heads": 8}
    del config["num_key_value_heads"]
    assert family_of(config).model_fields(config).transformer["num_query_groups"] == 4
    config["model_type"] = "qwen2"
    with pytest.raises(UserError, match="num_key_value_heads=32 does not divide"):
        family_of(config).model_fields(config)


def test_a_tied_model_may_hold_its_head_twice_and_an_untied_one_not() -> None:
    assert family_of(QWEN2).copies(QWEN2) == {"lm_head.weight": "model.embed_tokens.weight"}
    assert family_of(QWEN3_MOE).copies(QWEN3_MOE) == {}


def test_every_model_of_these_tests_is_of_a_supported_family(checkpoints: Checkpoints) -> None:
    assert {checkpoints[name].config["model_type"] for name in MODELS} == FAMILIES.keys()
    assert all(t.dtype == torch.float32 for t in checkpoints["qwen3"].tensors().values())
