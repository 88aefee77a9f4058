"""A checkpoint is whole, sound or refused, and readable at another layout."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import checkpoint_ranks
import pytest
import torch
from checkpoint_ranks import STATE, spoil
from tiny import VOCAB, run_config, tiny_qwen2
from tiny_models import MODELS
from torch.distributed.checkpoint import DefaultSavePlanner, save

from megatron_gpc.run.files import sha256

COSINE = ["optim.decay=cosine", "optim.warmup_updates=2", "optim.min_lr=1e-5"]
LAYOUTS = {  # processes, overrides
    "tp1": (1, []),
    "tp2": (2, ["parallel.tp=2"]),
    "pp2": (2, ["parallel.pp=2"]),
    "dp2": (2, ["parallel.dp=2"]),
    "pp2 vpp2": (2, ["parallel.pp=2", "parallel.vpp=2"]),
    "pp4": (4, ["parallel.pp=4"]),
    "tp2 pp2": (4, ["parallel.tp=2", "parallel.pp=2"]),
    "ep2": (2, ["parallel.dp=2", "parallel.ep=2"]),
    "pp2 ep2": (4, ["parallel.pp=2", "parallel.dp=2", "parallel.ep=2"]),
}
UNCUT = "optim.distributed=false"
BF16 = "model.dtype=bfloat16"
BACKGROUND = "checkpoint.asynchronous=true"
CASES = [  # model, saved at, its settings, resumed at
    ("dense", "pp4", [], ["tp2 pp2"]),
    ("dense", "dp2", [BACKGROUND], ["dp2", "tp2"]),
    ("dense", "pp2 vpp2", [UNCUT, BACKGROUND], ["pp2 vpp2", "tp2"]),
    ("tied", "tp2 pp2", [BF16], ["tp2 pp2", "dp2"]),
    # the first stage has no experts
    ("moe", "pp2 ep2", [], ["pp2 ep2", "tp1"]),
    ("moe", "pp2 ep2", [UNCUT], ["pp2 ep2", "dp2"]),
    ("moe", "dp2", [], ["ep2"]),
]
ROUNDING = {BF16: 3e-2}
"""Largest relative difference of losses and gradient norms at another layout.  Measured: bf16
1.3e-2, fp32 1e-6."""
FP32 = 5e-6


@pytest.fixture(scope="session")
def models(tmp_path_factory) -> dict[str, Path]:
    """Hugging Face folders by name."""
    import torch
    import transformers

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("models")
    _, settings = MODELS["qwen3_moe-some-dense"]
    config = transformers.Qwen3MoeConfig(**settings | {"vocab_size": VOCAB})
    model = transformers.Qwen3MoeForCausalLM(config)
    model.save_pretrained(folder / "moe")
    tiny_qwen2(folder / "tied", tie_word_embeddings=True)
    return {
        "dense": tiny_qwen2(folder / "dense"),
        "tied": folder / "tied",
        "moe": folder / "moe",
    }


def apart(ours, theirs) -> float:
    """The largest relative difference of losses and gradient norms."""
    return max(
        abs(a - b) / abs(b)
        for one, other in zip(ours, theirs, strict=True)
        for a, b in zip(one[:2], other[:2], strict=True)
    )


@pytest.mark.parametrize(
    ("model", "saved", "settings", "resumed"), CASES, ids=lambda v: v if isinstance(v, str) else ""
)
def test_a_run_goes_on_as_if_nothing_had_happened(
    models, pool, tmp_path, model, saved, settings, resumed
):
    """At the same layout to the bit; at another one within rounding."""
    world, layout = LAYOUTS[saved]
    config = run_config(tmp_path, models[model], *layout, *settings, *COSINE)
    want = pool(world).run(checkpoint_ranks.save_and_go_on, config)
    for name in resumed:
        world, layout = LAYOUTS[name]
        config = run_config(tmp_path, models[model], *layout, *settings, *COSINE)
        got = pool(world).run(checkpoint_ranks.resume_and_go_on, config)
        assert all(result["state"] == STATE for result in got)
        first, *others = (result["said"] for result in got)
        assert first.count("\n") == 1 and "resuming from step" in first and not any(others)
        ours, theirs = got[0]["updates"], want[0]["updates"]
        assert [one[2] for one in ours] == [one[2] for one in theirs], "learning rates"
        if name == saved:
            assert [result["updates"] for result in got] == [result["updates"] for result in want]
            assert [result["drawn"] for result in got] == [result["drawn"] for result in want]
            assert all(result["drawn"] != result["start"] for result in want)
        else:
            difference = apart(ours, theirs)
            print(f"{model} {settings}: {saved} -> {name}: {difference:.1e}")
            assert difference < max([FP32, *(ROUNDING.get(key, 0) for key in settings)])


def test_at_another_layout_random_numbers_are_decided_by_seed_and_step(models, pool, tmp_path):
    one, other = (run_config(tmp_path, models["dense"], f"parallel.{p}=2") for p in ("tp", "pp"))
    pool(2).run(checkpoint_ranks.save_at, one, [3])
    first, again = (pool(2).run(checkpoint_ranks.drawn_after_resuming, other) for _ in range(2))
    assert first == again
    pool(2).run(checkpoint_ranks.save_at, one, [4])
    later = pool(2).run(checkpoint_ranks.drawn_after_resuming, other)
    for before, after in zip(first, later, strict=True):
        assert not set(before.values()) & set(after.values())


def test_old_ones_are_removed_but_for_the_newest_and_those_kept_for_good(models, pool, tmp_path):
    config = run_config(
        tmp_path, models["dense"], "parallel.tp=2", "checkpoint.keep_every=4", BACKGROUND
    )
    for left in pool(2).run(checkpoint_ranks.save_at, config, [2, 4, 6, 8, 9, 10]):
        assert left == ["step_000004", "step_000008", "step_000009", "step_000010"]
    folder = config.run_dir / "checkpoints" / "step_000010"
    checked = subprocess.run(
        ["sha256sum", "-c", "--strict", "SHA256SUMS"], cwd=folder, capture_output=True, text=True
    )
    assert checked.returncode == 0, checked.stdout
    listed = {line.split(":")[0] for line in checked.stdout.splitlines()}
    assert listed == set(os.listdir(folder)) - {"SHA256SUMS"}
    assert {"__0_0.distcp", "__1_0.distcp", "common.pt", ".metadata", "metadata.json"} == listed


def test_a_damaged_checkpoint_is_named_set_aside_and_the_one_before_is_taken(
    models, pool, tmp_path
):
    config = run_config(tmp_path, models["dense"], "parallel.tp=2", "checkpoint.keep=4")
    pool(2).run(checkpoint_ranks.save_at, config, [1, 2, 3, 4])
    folder = config.run_dir / "checkpoints"
    spoil(folder / "step_000004" / "__1_0.distcp")
    (folder / "step_000003" / ".metadata").unlink()
    (folder / "step_000003" / "common.pt").write_bytes(b"")
    (folder / "step_000009.part").mkdir()
    (step, said), (other, silence) = pool(2).run(checkpoint_ranks.resumed, config)
    assert step == other == 2 and not silence
    four, three, two = said.splitlines()
    assert "resuming from step 2 (checkpoints/step_000002)" in two
    assert f"{folder}/step_000004 is damaged: __1_0.distcp is not what was written" in four
    assert ".metadata is missing; common.pt is not what was written" in three
    left = ["step_000001", "step_000002", "step_000003.damaged", "step_000004.damaged"]
    assert sorted(os.listdir(folder)) == left

    (folder / "step_000002" / "SHA256SUMS").unlink()
    spoil(folder / "step_000001" / "SHA256SUMS")
    for _ in range(
        2
    ):  # the second time all have been set aside: still no silent start from scratch
        for refused, _ in pool(2).run(checkpoint_ranks.resumed, config):
            assert "no checkpoint is sound" in refused and "resume=none" in refused
            assert "step_000001.damaged, step_000002.damaged" in refused


def test_a_sound_checkpoint_of_something_else_is_refused(models, pool, tmp_path):
    config = run_config(tmp_path, models["dense"], "parallel.tp=2")
    pool(2).run(checkpoint_ranks.save_at, config, [1])
    folder = config.run_dir / "checkpoints" / "step_000001"
    for name, write, says in (
        ("metadata.json", lambda f: f.write_text('{"sharded_backend": [1]}'), "cannot load"),
        ("common.pt", lambda f: torch.save({"optimizer": 1}, f), "common.pt is not what a run"),
    ):
        old = f"{sha256(folder / name)}  {name}"
        write(folder / name)
        sums = (folder / "SHA256SUMS").read_text()
        (folder / "SHA256SUMS").write_text(sums.replace(old, f"{sha256(folder / name)}  {name}"))
        for refused, _ in pool(2).run(checkpoint_ranks.resumed, config):
            assert says in refused and str(folder) in refused


class Runs:
    """Pickled, it makes a folder of that name where it is unpickled."""

    def __init__(self, folder: Path):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


def test_objects_of_a_checkpoint_are_data_alone(pool, tmp_path):
    mark, data = tmp_path / "mark", [1, ("a", torch.ones(2)), {"b": None}]
    for name, value in {"evil": Runs(mark), "good": data}.items():
        planner = DefaultSavePlanner(flatten_state_dict=False)
        save({"x": value}, checkpoint_id=tmp_path / name, planner=planner, no_dist=True)
    (loaded,) = pool(1).run(checkpoint_ranks.loaded_object, tmp_path / "good")
    assert str(loaded) == str(data)
    (loaded,) = pool(1).run(checkpoint_ranks.loaded_object, tmp_path / "evil")
    assert "UnpicklingError" in loaded and not mark.exists()


def test_without_fp8_no_scales_of_transformer_engine_are_taken(pool):
    none, some = torch.empty(0, dtype=torch.uint8), torch.ones(9, dtype=torch.uint8)
    for scales, says in ((none, ""), (some, "a._extra_state is not empty"), (None, "")):
        state = {"a.weight": some, "a._extra_state": scales}
        (said,) = pool(1).run(checkpoint_ranks.refused_scales, state)
        assert bool(said) == bool(says) and says in said


@pytest.mark.parametrize(
    ("trouble", "says"),
    [
        ("kill", "rank 1: the process that writes it was ended from outside"),
        pytest.param("hang", "it took longer than timeout_s=3", marks=pytest.mark.slow),
        ("finish", "Is a directory"),
    ],
)
def test_a_save_that_fails_in_the_background_leaves_the_one_before(
    models, pool, tmp_path, trouble, says
):
    settings = ["parallel.tp=2", BACKGROUND, "timeout_s=3"]
    config = run_config(tmp_path, models["dense"], *settings)
    for said, then in pool(2).run(checkpoint_ranks.failed_save, config, trouble):
        assert "step_000006: cannot be written: " in said and says in said
        assert "the same command continues from step_000005" in said
        assert then == 5


@pytest.mark.slow
@pytest.mark.parametrize("room", ["one and a half", "two without a last file"])
def test_a_full_disk_ends_the_save_on_every_rank_and_costs_nothing_else(
    models, pool, tmp_path, room
):
    def blocks(file: Path) -> int:
        return -(-file.stat().st_size // 4096) * 4096

    config = run_config(tmp_path, models["dense"], "parallel.tp=2")
    pool(2).run(checkpoint_ranks.save_at, config, [1])
    folder = config.run_dir / "checkpoints" / "step_000001"
    size = sum(blocks(file) for file in folder.iterdir())
    last = room == "two without a last file"  # which rank 0 writes when all others have written
    space = 2 * size - blocks(folder / ".metadata") if last else size + size // 8192 * 4096
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={space}", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("no file system may be mounted here")
    try:
        config = run_config(tmp_path, models["dense"], "parallel.tp=2", f"run_dir={disk}/run")
        for said, then in pool(2).run(checkpoint_ranks.failed_save, config, ""):
            assert "step_000006: cannot be written: " in said
            assert "No space left on device" in said
            assert ("cannot be written: rank" in said) != last
            assert then == 5
    finally:
        subprocess.run(["umount", str(disk)], check=True)
