"""Starting the ranks of a run."""

from __future__ import annotations

from megatron_gpc import __version__
from megatron_gpc.run.launch import run_ranks
from megatron_gpc.run.placement import Share


def test_ranks_run_this_package_and_not_one_that_lies_in_the_current_folder(
    tmp_path, monkeypatch, capfd
):
    (tmp_path / "megatron_gpc").mkdir()
    (tmp_path / "megatron_gpc" / "__init__.py").write_text("raise SystemExit(7)")
    monkeypatch.chdir(tmp_path)
    assert run_ranks(["--version"], Share.alone(2), tmp_path / "logs") == 0
    assert capfd.readouterr().out.strip() == __version__
    assert (tmp_path / "logs" / "rank_1.log").read_text().strip() == __version__
