"""Which file an evaluation goes to: the evaluated run's, and never over another evaluation."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from tiny import run_config

from megatron_gpc.errors import UserError
from megatron_gpc.evaluate import _keep
from megatron_gpc.rollout.evaluation_file import evaluation_of, file_for
from megatron_gpc.run.files import SUMS


@pytest.fixture
def hf(tmp_path) -> Path:
    folder = tmp_path / "models" / "hf"
    folder.mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(b"weights")
    return folder


@pytest.fixture
def config(tmp_path, hf):
    (tmp_path / "heldout.jsonl").write_text('{"prompt": "500=", "label": 500}\n')

    def make(*overrides: str):
        return run_config(tmp_path, hf, f"eval.prompts={tmp_path}/heldout.jsonl", *overrides)

    return make


@pytest.fixture
def checkpoint(tmp_path) -> Path:
    """Of a run that is not the configuration's."""
    folder = tmp_path / "other" / "run" / "checkpoints" / "step_000040"
    folder.mkdir(parents=True)
    (folder / SUMS).write_text("0  metadata.json\n")
    (tmp_path / "other" / "run" / "config.yaml").write_text("seed: 7\n")
    return folder


def _file(config, checkpoint, out=None) -> Path:
    return file_for(evaluation_of(config, checkpoint), config, out)


def test_the_result_goes_to_the_run_that_saved_the_checkpoint(config, checkpoint, tmp_path):
    file = _file(config(), checkpoint)
    assert file.parent == tmp_path / "other" / "run" / "evaluations"
    assert file.name.startswith("step_000040-heldout-")
    link = tmp_path / "newest"
    link.symlink_to(checkpoint)
    assert _file(config(), link) == file
    about = evaluation_of(config(), checkpoint).described()
    assert about["run"]["folder"] == str(tmp_path / "other" / "run")
    assert about["run"]["config"] == {"seed": 7}


def test_of_a_folder_that_no_run_saved_it_goes_beside_the_runs(config, hf, tmp_path):
    file = _file(config(), hf)
    assert file.parent == tmp_path / "evaluations"
    assert file.name.startswith("hf-heldout-")
    assert evaluation_of(config(), hf).described()["run"] is None


def test_other_prompts_settings_or_weights_have_another_file(config, checkpoint, hf, tmp_path):
    overrides = [
        *((), ("eval.samples=8",), ("eval.temperature=0.5",), ("rollout.temperature=0.5",)),
        *(("eval.top_p=0.9",), ("eval.top_k=5",), ("eval.max_response_tokens=5",), ("seed=3",)),
        *(("data.verifier=math",), ("eval.pass_k=1",), ("data.chat_template={a: 1}",)),
    ]
    for source in (checkpoint, hf):
        files = {overrides: _file(config(*overrides), source) for overrides in overrides}
        same = {("eval.temperature=0.5",), ("rollout.temperature=0.5",)}
        assert files.pop(same.pop()) == files[same.pop()], "two spellings of one evaluation"
        assert len({*files.values()}) == len(files)
        (tmp_path / "heldout.jsonl").write_text('{"prompt": "501=", "label": 501}\n')
        assert _file(config(), source) not in files.values(), "the same name, other prompts"
        (tmp_path / "heldout.jsonl").write_text('{"prompt": "500=", "label": 500}\n')
        assert _file(config(), source) == files[()]
    before = _file(config(), checkpoint), _file(config(), hf)
    (checkpoint / SUMS).write_text("1  metadata.json\n")
    (hf / "model.safetensors").write_bytes(b"other weights")
    assert not {_file(config(), checkpoint), _file(config(), hf)} & {*before}


def test_what_trains_a_run_and_decides_no_sample_leaves_the_file_as_it_is(config, checkpoint):
    overrides = ("optim.lr=1e-5", "eval.every=5", "rollout.prompts_per_step=8", "clip.schedule=id")
    assert _file(config(*overrides), checkpoint) == _file(config(), checkpoint)


def test_a_checkpoint_that_the_run_removes_meanwhile_stays_readable(checkpoint, hf, tmp_path):
    kept = _keep(checkpoint, tmp_path / "kept")
    shutil.rmtree(checkpoint)
    assert (kept / SUMS).read_text() == "0  metadata.json\n"
    assert _keep(hf, tmp_path / "other") == hf, "no run removes it"


def test_a_named_file_with_something_else_in_it_is_refused(config, checkpoint, tmp_path):
    out = tmp_path / "found.json"
    assert _file(config(), checkpoint, out) == out
    out.write_text(json.dumps(evaluation_of(config(), checkpoint).described()))
    assert _file(config(), checkpoint, out) == out, "the same evaluation may be made again"
    with pytest.raises(UserError, match=f"--out: {out} .*another evaluation; remove it, or name"):
        _file(config("eval.samples=8"), checkpoint, out)
    for text in ("", "[]", "{}", '{"mean": 1}', "\x00"):
        out.write_text(text)
        with pytest.raises(UserError, match="no evaluation that could be told from this"):
            _file(config(), checkpoint, out)
    with pytest.raises(UserError, match="is a folder"):
        _file(config(), checkpoint, tmp_path)
