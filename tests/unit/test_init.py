"""`megatron-gpc init`: a run to start from."""

from __future__ import annotations

import pytest
from commands import command_line, metrics

from megatron_gpc.cli import main
from megatron_gpc.commands.init import FILES


def test_it_writes_a_run_that_can_be_trained(tmp_path, capsys, monkeypatch):
    folder = tmp_path / "new" / "run of mine"
    assert main(["init", str(folder)]) == 0
    assert sorted(file.name for file in folder.iterdir()) == sorted(FILES)
    said = capsys.readouterr().out
    assert str(folder / "reward.py") in said and "run of mine/config.yaml'" in said
    monkeypatch.chdir(folder)
    assert main(["train", "config.yaml", "--dry-run"]) == 0
    resolved = capsys.readouterr()
    assert "reward.py:reward" in resolved.out and "model is not there yet" in resolved.err
    assert sorted(file.name for file in folder.iterdir()) == sorted(FILES)


@pytest.mark.parametrize("name", FILES)
def test_it_replaces_no_file(tmp_path, capsys, name):
    (tmp_path / name).write_text("mine")
    assert main(["init", str(tmp_path)]) == 2
    assert f"{tmp_path / name} exists already" in capsys.readouterr().err
    assert [file.name for file in tmp_path.iterdir()] == [name]
    assert (tmp_path / name).read_text() == "mine"


def test_it_says_that_a_folder_cannot_be_made(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert main(["init", str(tmp_path / "file" / "run")]) == 2
    assert "file/run: cannot be written to" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_run_works_as_it_is(tmp_path):
    assert main(["init", str(tmp_path)]) == 0
    done = command_line("train", str(tmp_path / "config.yaml"), "train.steps=3", timeout=500)
    assert done.returncode == 0, done.stderr
    assert [line["step"] for line in metrics(tmp_path / "run")] == [1, 2, 3]
