"""A converted checkpoint is training's own: same keys, every layout, same logits; and back."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import conversion_ranks
import pytest
import torch
from pool import Pool
from tiny import random_batch, run_config, tiny_qwen2
from tiny_models import MODELS, Checkpoints, content, make_model, same

from megatron_gpc.algo.clipping import affine_bounds
from megatron_gpc.run.folder import prepare
from megatron_gpc.weights.convert import hf_to_megatron, megatron_to_hf

LARGEST = 2e-5
"""Logits are of size 1 to 10 in fp32; measured differences are below 1e-5."""
SEQUENCES = [
    torch.randint(0, 128, (length,), generator=torch.Generator().manual_seed(length)).tolist()
    for length in (24, 17, 3)
]
BOUNDS = affine_bounds((-0.25, 0.5), (-0.13, 0.3))
SP = "parallel.sequence_parallel=true"
LAYOUTS = {  # processes, overrides; expert parallelism for those with experts
    "tp1": (1, []),
    "tp2": (2, ["parallel.tp=2"]),
    "tp4": (4, ["parallel.tp=4"]),
    "pp2": (2, ["parallel.pp=2"]),
    "tp2 pp2 sp": (4, ["parallel.tp=2", "parallel.pp=2", SP]),
    "ep2": (2, ["parallel.dp=2", "parallel.ep=2"]),
    "tp2 sp ep2": (4, ["parallel.tp=2", "parallel.dp=2", "parallel.ep=2", SP]),
}


@pytest.fixture(scope="module")
def converted_of(checkpoints: Checkpoints, tmp_path_factory) -> Callable[[str], Path]:
    """converted_of(name): that model as a distributed checkpoint."""
    root = tmp_path_factory.mktemp("converted")

    def get(name: str) -> Path:
        if not (root / name).exists():
            hf_to_megatron(checkpoints[name].folder, root / name)
        return root / name

    return get


@pytest.fixture(scope="module")
def reference() -> dict[str, list[torch.Tensor]]:
    """transformers' logits."""
    with torch.no_grad():
        return {
            name: [model(torch.tensor([sequence])).logits[0] for sequence in SEQUENCES]
            for name in MODELS
            for model in [make_model(name)]
        }


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_computes_transformers_logits(
    checkpoints: Checkpoints,
    converted_of: Callable[[str], Path],
    reference: dict[str, list[torch.Tensor]],
    pool: Callable[[int], Pool],
    tmp_path: Path,
    layout: str,
) -> None:
    world, overrides = LAYOUTS[layout]
    # megatron-core trains experts under tensor parallelism with sequence parallelism only
    names = [name for name in MODELS if "moe" in name or "parallel.ep=2" not in overrides]
    given = {name: (checkpoints[name].folder, converted_of(name)) for name in names}
    config = run_config(tmp_path, tmp_path, *overrides)
    found: dict[str, list[torch.Tensor]] = {}
    for result in pool(world).run(conversion_ranks.logits_of, config, given, SEQUENCES):
        assert not found.keys() & result.keys()
        found.update(result)
    assert found.keys() == set(names)
    for name in names:
        pairs = zip(found[name], reference[name], strict=True)
        largest = max(float((ours - theirs).abs().max()) for ours, theirs in pairs)
        print(f"{name:28} {layout:10} {largest:.1e}")
        assert largest < LARGEST, name


def test_virtual_pipeline_stages_load_as_well(pool: Callable[[int], Pool], tmp_path: Path) -> None:
    hf = tiny_qwen2(tmp_path / "hf")
    hf_to_megatron(hf, tmp_path / "converted")
    given = {"qwen2": (hf, tmp_path / "converted")}
    sequences = [[token % 100 for token in sequence] for sequence in SEQUENCES]
    vpp = ["parallel.pp=2", "parallel.vpp=2"]
    one = run_config(tmp_path, hf)
    (want,) = pool(1).run(conversion_ranks.logits_of, one, given, sequences)
    config = run_config(tmp_path, hf, *vpp)
    got = pool(2).run(conversion_ranks.logits_of, config, given, sequences)[1]
    for ours, theirs in zip(got["qwen2"], want["qwen2"], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=LARGEST)


@pytest.mark.parametrize(
    "name",
    ["qwen2-tied", "qwen2-untied", "qwen3", "qwen3_moe", "qwen3_moe-some-dense", "qwen2_moe"],
)
def test_keys_shapes_and_pieces_are_those_that_training_saves(
    checkpoints: Checkpoints,
    converted_of: Callable[[str], Path],
    pool: Callable[[int], Pool],
    tmp_path: Path,
    name: str,
) -> None:
    config = run_config(tmp_path, checkpoints[name].folder)
    ((saved, _),) = pool(1).run(conversion_ranks.start_update_save, config, random_batch(), BOUNDS)
    assert conversion_ranks.described(converted_of(name)) == conversion_ranks.described(saved)
    keys = set(conversion_ranks.described(saved))
    # transformer-engine's name, which the local layer spec alone would not give
    assert ("moe" in name) == any(key.endswith("pre_mlp_layernorm.weight") for key in keys)


@pytest.mark.parametrize(
    ("name", "world", "overrides"),
    [
        ("qwen2-tied", 4, ["parallel.tp=2", "parallel.pp=2", SP]),
        ("qwen2-untied", 4, ["parallel.tp=4"]),
        ("qwen3_moe-some-dense", 2, ["parallel.dp=2", "parallel.ep=2"]),
        ("qwen2_moe", 4, ["parallel.tp=2", "parallel.dp=2", "parallel.ep=2", SP]),
    ],
)
def test_what_training_saved_converts_to_hugging_face(
    checkpoints: Checkpoints,
    converted_of: Callable[[str], Path],
    pool: Callable[[int], Pool],
    tmp_path: Path,
    name: str,
    world: int,
    overrides: list[str],
) -> None:
    start = converted_of(name)
    config = run_config(tmp_path, start, *overrides)
    prepare(config)
    results = pool(world).run(conversion_ranks.start_update_save, config, random_batch(), BOUNDS)
    saved, synced = results[0]
    megatron_to_hf(saved, tmp_path / "hf")  # finds the model through the run's config.yaml
    assert same(content(tmp_path / "hf"), synced)
    before = checkpoints[name].tensors()
    assert before.keys() == synced.keys() and not same(before, synced)
    model = copy.deepcopy(make_model(name))
    loaded = type(model).from_pretrained(tmp_path / "hf")
    assert torch.isfinite(loaded(torch.tensor([SEQUENCES[0]])).logits).all()


def test_starting_from_a_converted_checkpoint_is_starting_from_hugging_face(
    checkpoints: Checkpoints,
    converted_of: Callable[[str], Path],
    pool: Callable[[int], Pool],
    tmp_path: Path,
) -> None:
    weights = []
    for start in (checkpoints["qwen3"].folder, converted_of("qwen3")):
        own = f"run_dir={tmp_path}/{len(weights)}"
        config = run_config(tmp_path, start, "parallel.tp=2", own)
        run = conversion_ranks.start_update_save
        weights.append(pool(2).run(run, config, random_batch(), BOUNDS)[0][1])
    assert same(*weights)


def test_training_refuses_a_damaged_checkpoint_on_every_rank(
    single: Path, converted: Path, pool: Callable[[int], Pool], tmp_path: Path
) -> None:
    config = run_config(tmp_path, single, "parallel.tp=2")
    with (converted / "__0_0.distcp").open("r+b") as stream:
        stream.write(b"spoiled" * 40)
    for said in pool(2).run(conversion_ranks.refusal, config, single, converted):
        assert said.startswith(f"{converted}: cannot load this checkpoint: ")
        assert "Traceback" not in said
    (converted / "__0_0.distcp").unlink()
    for said in pool(2).run(conversion_ranks.refusal, config, single, converted):
        assert "__0_0.distcp (with embedding.word_embeddings.weight) is absent" in said
