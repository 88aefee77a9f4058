"""Weights come in whole or not at all, and a pickle of anything but tensors does not come in."""

from __future__ import annotations

import base64
import json
import os
import pickle
import re
import shutil
from pathlib import Path

import pytest
import torch
from rollout_models import build_model
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel, Qwen3MoeConfig, Qwen3MoeForCausalLM

from megatron_gpc.engines.client import pack_tensors
from megatron_gpc.errors import UserError
from megatron_gpc.server.loading import (
    load_folder,
    reloaded,
    unpack_tensors,
    with_tensors,
)

UP = "model.layers.1.mlp.up_proj.weight"


def logits(model: PreTrainedModel) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.arange(20)[None]).logits


def test_tensors_survive_the_wire():
    sent = [
        ("a", torch.randn(3, 4).T),
        ("b", torch.randn(5).bfloat16()),
        ("c", torch.arange(6)[2:4]),
    ]
    packed = pack_tensors(sent)
    received = unpack_tensors(packed)
    assert [name for name, _ in received] == ["a", "b", "c"]
    for (_, before), (_, after) in zip(sent, received, strict=True):
        assert before.dtype == after.dtype and torch.equal(before, after)


def test_a_view_is_sent_without_the_tensor_behind_it():
    whole = torch.zeros(100_000)
    assert len(pack_tensors([("part", whole[:10])])) < 5_000


class _Call:
    """Pickles to a call of `function`."""

    def __init__(self, function: object, *args: object):
        self.call = (function, args)

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize(
    "content",
    [
        pickle.dumps([("a", _Call(os.mkdir, "pwned"))]),
        pickle.dumps([("a", _Call(torch.load, "pwned"))]),
        pickle.dumps(
            [("a", _Call(torch.storage._load_from_bytes, pickle.dumps(_Call(os.mkdir, "pwned"))))]
        ),
        pickle.dumps({"a": 1}),
        pickle.dumps([("a", 1)]),
        b"no pickle",
        b"",
    ],
)
def test_a_pickle_of_anything_but_tensors_is_refused_and_runs_nothing(
    content, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="serialized_named_tensors"):
        unpack_tensors(base64.b64encode(content).decode())
    assert not Path("pwned").exists()


def test_unfit_tensors_are_refused_by_name_and_change_nothing(model_a):
    model = load_folder(model_a, "auto")
    before = logits(model)
    good = ("model.norm.weight", torch.zeros(32))
    with pytest.raises(UserError, match="model.nose.weight"):
        with_tensors(model, [good, ("model.nose.weight", torch.zeros(32))])
    with pytest.raises(UserError, match=rf"{UP}: has shape \[3, 32\], the model needs \[64, 32\]"):
        with_tensors(model, [good, (UP, torch.zeros(3, 32))])
    assert torch.equal(logits(model), before)


@pytest.mark.parametrize("damage", ["missing", "unexpected", "shape", "garbage", "no file"])
def test_an_unfit_folder_is_refused_by_name(model_a, tmp_path, damage):
    folder = shutil.copytree(model_a, tmp_path / "damaged")
    file = folder / "model.safetensors"
    state = load_file(file)
    if damage == "missing":
        del state[UP]
    elif damage == "unexpected":
        state["model.nose.weight"] = torch.zeros(3)
    elif damage == "shape":
        state[UP] = torch.zeros(3, 32)
    save_file(state, file, metadata={"format": "pt"})
    if damage == "garbage":
        file.write_bytes(b"garbage")
    elif damage == "no file":
        file.unlink()
    named = {"missing": UP, "unexpected": "model.nose.weight", "shape": UP}.get(damage, "damaged")
    with pytest.raises(UserError, match=named):
        load_folder(folder, "auto", load_folder(model_a, "auto").config)
    model = load_folder(model_a, "auto")
    before = logits(model)
    with pytest.raises(UserError, match=named):
        reloaded(model, folder)
    assert torch.equal(logits(model), before)


def test_weights_that_are_not_finite_are_not_reloaded(model_a, tmp_path):
    folder = shutil.copytree(model_a, tmp_path / "nan")
    state = load_file(folder / "model.safetensors")
    state["model.norm.weight"][0] = torch.nan
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    model = load_folder(model_a, "auto")
    before = logits(model)
    with pytest.raises(UserError, match="model.norm.weight"):
        reloaded(model, folder)
    assert torch.equal(logits(model), before)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_reloaded_is_as_loaded_afresh(tmp_path, tied, dtype):
    folders = [build_model(tmp_path / str(seed), seed, tied) for seed in (1, 2)]
    model = load_folder(folders[0], dtype)
    changed = reloaded(model, folders[1])
    assert changed is model  # no new model was built
    assert torch.equal(logits(changed), logits(load_folder(folders[1], dtype)))


def test_rewriting_the_file_does_not_change_loaded_weights(model_a, tmp_path):
    folder = shutil.copytree(model_a, tmp_path / "model")
    model = load_folder(folder, "auto")
    before = logits(model)
    file = folder / "model.safetensors"
    size = file.stat().st_size
    with file.open("r+b") as stream:  # in place, as a memory map would notice
        stream.seek(size // 2)
        stream.write(bytes(size - size // 2))
    assert torch.equal(logits(model), before)


@pytest.mark.parametrize("name", ["model.embed_tokens.weight", "lm_head.weight"])
def test_a_tied_head_stays_tied_under_either_name(model_tied, name):
    model = load_folder(model_tied, "auto")
    new = torch.randn_like(model.get_input_embeddings().weight)
    changed = with_tensors(model, [(name, new)])
    assert changed.get_input_embeddings().weight is changed.get_output_embeddings().weight
    assert torch.equal(changed.get_output_embeddings().weight, new)


def test_an_untied_model_takes_embedding_and_head_apart(model_a):
    model = load_folder(model_a, "auto")
    new = torch.randn_like(model.get_output_embeddings().weight)
    changed = with_tensors(model, [("lm_head.weight", new)])
    assert torch.equal(changed.get_output_embeddings().weight, new)
    assert torch.equal(changed.get_input_embeddings().weight, model.get_input_embeddings().weight)


def test_a_mixture_of_experts_is_updated_by_its_checkpoint_names(tmp_path):
    """transformers keeps experts as one tensor in memory, checkpoints have one a matrix."""
    config = Qwen3MoeConfig(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=16,
        moe_intermediate_size=8,
        num_experts=4,
        num_experts_per_tok=2,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
    )
    for name in ("old", "new"):
        Qwen3MoeForCausalLM(config).save_pretrained(tmp_path / name)
    state = load_file(tmp_path / "new" / "model.safetensors")
    assert "model.layers.0.mlp.experts.3.gate_proj.weight" in state
    want = logits(load_folder(tmp_path / "new", "auto"))
    changed = with_tensors(load_folder(tmp_path / "old", "auto"), list(state.items()))
    assert torch.equal(logits(changed), want)
    for tensor in state.values():  # they are the sender's, who uses their memory again
        tensor.zero_()
    assert torch.equal(logits(changed), want)
    changed = reloaded(load_folder(tmp_path / "old", "auto"), tmp_path / "new")
    assert torch.equal(logits(changed), want)


def test_a_folder_that_does_not_exist_is_named(tmp_path):
    with pytest.raises(UserError, match="nowhere: no such folder"):
        load_folder(tmp_path / "nowhere", "auto")


def test_the_dtype_is_the_checkpoints_unless_given(tmp_path):
    folder = build_model(tmp_path / "model", seed=3)
    assert load_folder(folder, "auto").dtype == torch.float32
    assert load_folder(folder, "bfloat16").dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"rope_theta": 5e5}, "rope_parameters.rope_theta=10000.0 and rope_theta=500000.0"),
        ({"dtype": "float32", "torch_dtype": "bfloat16"}, "torch_dtype='bfloat16'"),
        ({"rms_norm_eps": None}, "rms_norm_eps"),
    ],
    ids=str,
)
def test_what_the_trainer_refuses_of_config_json_is_refused_here(model_a, tmp_path, change, says):
    shutil.copytree(model_a, tmp_path / "copy")
    file = tmp_path / "copy" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    with pytest.raises(UserError, match=re.escape(says)):
        load_folder(tmp_path / "copy", "auto")
