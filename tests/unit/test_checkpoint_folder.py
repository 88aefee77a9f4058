"""Checkpoint folders without a model: checksums, names, what is kept."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from megatron_gpc.mcore.checkpoint import folder as folders
from megatron_gpc.run.files import by_step, problems, problems_of_all, sha256

FILES = (".metadata", "__0_0.distcp", "__1_0.distcp", "common.pt", "metadata.json")


def write(run_dir: Path, step: int) -> Path:
    final = folders.final_name(run_dir, step)
    part = folders.part_name(final)
    part.mkdir(parents=True)
    for name in FILES:
        (part / name).write_bytes(os.urandom(100))
    folders.publish(part, final, {name: sha256(part / name) for name in FILES})
    return final


def cut_sums(folder: Path, keep: int) -> None:
    lines = (folder / "SHA256SUMS").read_text().splitlines(keepends=True)
    (folder / "SHA256SUMS").write_text("".join(lines[:keep]))


def drop_line(folder: Path, name: str) -> None:
    lines = (folder / "SHA256SUMS").read_text().splitlines(keepends=True)
    (folder / "SHA256SUMS").write_text("".join(line for line in lines if name not in line))


@pytest.mark.parametrize("shares", [1, 2, 3, 8])
def test_a_sound_checkpoint_has_no_problem_and_every_file_is_in_one_share(tmp_path, shares):
    folder = write(tmp_path, 1)
    assert [one for share in range(shares) for one in problems(folder, share, shares)] == []
    for name in FILES:
        (folder / name).write_text("spoiled")
    found = [one for share in range(shares) for one in problems(folder, share, shares)]
    assert sorted(one.split()[0] for one in found) == sorted(FILES)


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda f: (f / "common.pt").write_bytes(b""), ["common.pt is not what was written"]),
        (lambda f: (f / "__1_0.distcp").unlink(), ["__1_0.distcp is missing"]),
        (lambda f: (f / "SHA256SUMS").unlink(), ["SHA256SUMS is missing"]),
        (lambda f: (f / "SHA256SUMS").write_text(""), ["SHA256SUMS is cut short"]),
        (lambda f: cut_sums(f, 4), ["SHA256SUMS is cut short"]),
        (lambda f: drop_line(f, "__1_0.distcp"), ["SHA256SUMS does not list __1_0.distcp"]),
        (lambda f: drop_line(f, "common.pt"), ["SHA256SUMS does not list common.pt"]),
        (lambda f: (f / "SHA256SUMS").write_bytes(b"\xff" * 99), ["SHA256SUMS cannot be read"]),
        (
            lambda f: ((f / "common.pt").unlink(), (f / "common.pt").mkdir()),
            ["common.pt cannot be read: Is a directory"],
        ),
    ],
)
def test_every_damage_is_named(tmp_path, damage, says):
    folder = write(tmp_path, 1)
    damage(folder)
    found = sorted(problems_of_all(folder))
    assert len(found) == len(says)
    for one, expected in zip(found, says, strict=True):
        assert one.startswith(expected)


def test_only_final_names_are_checkpoints_and_they_are_in_the_order_of_steps(tmp_path):
    for step in (7, 1_000_000, 20):
        write(tmp_path, step)
    for name in ("step_000030.part", "step_000031.damaged", "notes", "step_x"):
        (tmp_path / "checkpoints" / name).mkdir()
    found = folders.checkpoints(tmp_path)
    assert [folder.name for folder in found] == ["step_000007", "step_000020", "step_1000000"]
    assert [folder.name for folder in folders.damaged(tmp_path)] == ["step_000031.damaged"]
    folders.remove_parts(tmp_path)
    assert not (tmp_path / "checkpoints" / "step_000030.part").exists()


def test_damaged_ones_are_all_kept(tmp_path):
    names = [folders.set_aside(write(tmp_path, 5)).name for _ in range(3)]
    assert names == [f"step_000005.damaged{suffix}" for suffix in ("", "-2", "-3")]


@pytest.mark.parametrize(
    ("keep", "keep_every", "left"),
    [(2, 0, [5, 6]), (1, 3, [3, 6]), (1, 2, [2, 4, 6]), (9, 0, [1, 2, 3, 4, 5, 6])],
)
def test_what_is_removed(tmp_path, keep, keep_every, left):
    for step in range(1, 7):
        write(tmp_path, step)
    folders.remove_old(tmp_path, keep, keep_every)
    assert list(by_step(tmp_path / "checkpoints")) == left
    assert len(os.listdir(tmp_path / "checkpoints")) == len(left)
