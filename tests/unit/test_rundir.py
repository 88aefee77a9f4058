"""The folder of a run, before the run."""

from __future__ import annotations

import errno
import os
import signal
import threading
import time

import pytest
from damage import small_disk
from tiny import run_config

from megatron_gpc.errors import UserError
from megatron_gpc.run.files import disk_problem, replace_text
from megatron_gpc.run.folder import make_model, prepare


@pytest.fixture
def again(tmp_path, capsys):
    """again(*overrides): what is said when a run is started once more under other settings."""
    prepare(run_config(tmp_path, tmp_path))

    def start(*overrides):
        prepare(run_config(tmp_path, tmp_path, *overrides))
        return capsys.readouterr().err

    return start


OTHER = ("clip.schedule=static", "eval.prompts=/p.jsonl", "megatron.ddp.bucket_size=7")


def test_what_changed_since_the_last_start_is_named_by_key_with_both_values(again, tmp_path):
    (tmp_path / "run" / "checkpoints" / "step_000002").mkdir(parents=True)
    assert again() == ""
    said = again(*OTHER)
    assert "continuing a run under another configuration; changed: " in said
    assert said.strip().endswith(
        "clip.schedule id -> static, eval.prompts None -> /p.jsonl, "
        "megatron.ddp.bucket_size None -> 7"
    )
    assert again(*OTHER) == ""


def test_a_run_without_a_checkpoint_starts_anew_and_nothing_is_said(again, tmp_path):
    (tmp_path / "run" / "checkpoints" / "step_000002.part").mkdir(parents=True)
    assert again(*OTHER) == ""


def test_a_damaged_configuration_of_the_run_is_refused(again, tmp_path):
    (tmp_path / "run" / "checkpoints" / "step_000002").mkdir(parents=True)
    (tmp_path / "run" / "config.yaml").write_bytes(b"\xff\x00")
    with pytest.raises(UserError, match="config.yaml is damaged; remove it"):
        again()


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=f"run_dir: {tmp_path}/file/run: Not a directory"):
        prepare(run_config(tmp_path, tmp_path, f"run_dir={tmp_path}/file/run"))


def test_an_interrupt_that_another_thread_gets_ends_what_makes_the_model_too(tmp_path):
    script, started = tmp_path / "build.py", tmp_path / "started"
    script.write_text(
        "import os, time\n"
        f"open({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid()))\n"
        f"os.rename({str(tmp_path / 'pid')!r}, {str(started)!r})\n"
        "time.sleep(20)\n"
    )

    def interrupt() -> None:
        while not started.exists():
            time.sleep(0.01)
        time.sleep(0.5)  # by then the process of the script is waited for
        signal.pthread_kill(threading.get_ident(), signal.SIGINT)

    thread = threading.Thread(target=interrupt, daemon=True)
    thread.start()
    config = run_config(tmp_path, tmp_path / "absent", f"model.build={script}")
    with pytest.raises(KeyboardInterrupt):
        make_model(config)
    with pytest.raises(ProcessLookupError):
        os.kill(int(started.read_text()), 0)


def test_a_file_that_cannot_be_replaced_stays_and_leaves_no_part(tmp_path):
    file = tmp_path / "config.yaml"
    replace_text(file, "old")
    with pytest.raises(OSError, match="File too large"), small_disk(3):
        replace_text(file, "longer")
    assert file.read_text() == "old" and list(tmp_path.iterdir()) == [file]


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "RUN: No space left on device"),
        (FileNotFoundError(errno.ENOENT, "No file", "RUN/samples"), "RUN/samples: No file"),
        (FileNotFoundError(errno.ENOENT, "No file", "elsewhere"), None),
        (ConnectionResetError(errno.ECONNRESET, "Connection reset by peer"), None),
    ],
)
def test_what_keeps_a_run_from_writing_is_told_from_other_errors(tmp_path, error, said):
    if error.filename:
        error.filename = error.filename.replace("RUN", str(tmp_path))
    assert disk_problem(error, tmp_path) == (said and said.replace("RUN", str(tmp_path)))
