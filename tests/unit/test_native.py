"""What may be set under `megatron.*`, and in which types."""

from __future__ import annotations

import dataclasses

import pytest
from tiny import run_config

from megatron_gpc.errors import UserError
from megatron_gpc.weights import FAMILIES, family_of

MODEL = {
    **{"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "vocab_size": 100},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64},
    **{"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32},
    "shared_expert_intermediate_size": 32,
}


@pytest.fixture(scope="module")
def native():
    """mcore/native.py, which imports megatron: patches first."""
    from megatron_gpc.mcore import cpu

    cpu.install()
    from megatron_gpc.mcore import native

    return native


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("optimizer.lr=1", "cannot be set here; set optim.lr"),
        ("transformer.moe_enable_routing_replay=true", "set train.routing_replay"),
        ("transformer.moe_grouped_gemm=true", "set train.experts"),
        ("transformer.num_layers=8", "num_layers cannot be set; it follows from model.hf"),
        ("transformer.rotary_interleaved=true", "it follows from model.hf"),
        ("transformer.perform_initialization=false", "the gradient norm relies on it"),
        ("transformer.recompute_granularty=full", "did you mean 'recompute_granularity'"),
        ("transformer.recompute_num_layers=many", "input should be a valid integer, unable"),
        ("transformer.recompute_granularity=half", "should be 'full' or 'selective', got 'half'"),
        ("transformer.attention_backend=flush", "expected one of flash, fused, unfused"),
        ("transformer.no_sync_func=f", "no_sync_func cannot be set in a configuration"),
        ("transformer.autocast_dtype=bfloat16", "autocast_dtype cannot be set in a configuration"),
        ("ddp.overlap_param_gather=true", "weights are handed over right after an update"),
        ("optimizer.overlap_param_gather=true", "weights are handed over right after an update"),
        ("ddp.bucket_size=a", "megatron.ddp.bucket_size: input should be a valid integer"),
        ("optimizer.main_params_dtype=fp32", "cannot be set in a configuration"),
    ],
)
def test_refused_by_name(native, tmp_path, override, says):
    with pytest.raises(UserError) as error:
        native.check_overrides(run_config(tmp_path, tmp_path, f"megatron.{override}"), None)
    assert says in str(error.value)


@pytest.mark.parametrize("name", FAMILIES)
def test_no_field_that_follows_from_the_model_can_be_set(native, tmp_path, name):
    fields = family_of({"model_type": name}).model_fields({**MODEL, "model_type": name})
    for field in fields.transformer:
        config = run_config(tmp_path, tmp_path, f"megatron.transformer.{field}=1")
        with pytest.raises(UserError, match="follows from model.hf"):
            native.check_overrides(config, fields)


def test_settings_that_contradict_each_other_are_refused_in_megatrons_words(native, tmp_path):
    config = run_config(tmp_path, tmp_path, "megatron.transformer.recompute_granularity=full")
    native.check_overrides(config, None)  # nothing wrong with the field alone
    fields = family_of({"model_type": "qwen2"}).model_fields({**MODEL, "model_type": "qwen2"})
    with pytest.raises(UserError, match="under megatron: .*recompute_method must be"):
        native.check_overrides(config, fields)


def test_a_fused_router_and_routes_of_the_rollout_exclude_each_other(native, tmp_path):
    fields = family_of({"model_type": "qwen3_moe"}).model_fields(
        {**MODEL, "model_type": "qwen3_moe", "num_experts_per_tok": 2}
    )
    fused = run_config(tmp_path, tmp_path, "megatron.transformer.moe_router_fusion=true")
    replayed = dataclasses.replace(
        fused, train=dataclasses.replace(fused.train, routing_replay=True)
    )
    with pytest.raises(UserError, match="moe_router_fusion=true leaves no room"):
        native.check_overrides(replayed, fields)


def test_every_refused_name_is_a_field_of_megatron(native):
    fields = {f.name for kind in native._SECTIONS.values() for f in dataclasses.fields(kind)}
    refused = native._MODEL_FIELDS | native._OWN_KEYS.keys() | native._RELIED_ON.keys()
    assert refused <= fields


def test_values_reach_megatron_in_the_type_of_their_field(native, tmp_path):
    config = run_config(
        tmp_path,
        tmp_path,
        "megatron.transformer.attention_backend=unfused",
        "megatron.optimizer.initial_loss_scale=1e4",  # YAML 1.1 reads this as text
    )
    fields = family_of({"model_type": "qwen2"}).model_fields({**MODEL, "model_type": "qwen2"})
    core = native.transformer_config(config, fields)
    assert core.attention_backend.name == "unfused" and core.num_layers == 2
    assert native.optimizer_config(config).initial_loss_scale == 10000.0
