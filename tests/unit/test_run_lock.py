"""Whether a run lives: its locks know."""

from __future__ import annotations

import fcntl
import json
import os
import socket
import threading
import time

import pytest

from megatron_gpc.errors import UserError
from megatron_gpc.run.lock import PREPARING, RUNNING, life, take


def test_a_run_lives_while_a_process_holds_its_lock(tmp_path):
    assert life(tmp_path) == "it is not running"
    launcher = take(tmp_path, PREPARING)
    here = f"process {os.getpid()} on {socket.gethostname()}, since 2"
    assert life(tmp_path).startswith(f"it is starting, or ending: {here}")
    with take(tmp_path):
        assert life(tmp_path).startswith(f"it is running: {here}")
        with pytest.raises(UserError, match=f"is in use by a run that has not ended .{here}"):
            take(tmp_path)
    launcher.close()
    assert life(tmp_path) == "it is not running"


def test_where_it_ran_on_another_host_the_answer_says_so(tmp_path):
    (tmp_path / RUNNING).write_text(json.dumps({"host": "node7", "pid": 3, "since": 0}))
    assert "it is not running; it ran on node7, and not every file system" in life(tmp_path)
    with take(tmp_path):
        assert "node7" not in life(tmp_path)


@pytest.mark.parametrize("text", ["", "\x00", "[1]", "{}", '{"host": 1}'])
def test_what_an_older_version_or_a_crash_left_in_a_lock_does_no_harm(tmp_path, text):
    (tmp_path / RUNNING).write_text(text)
    with (tmp_path / RUNNING).open() as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        assert life(tmp_path) == "it is running"
    assert life(tmp_path).startswith("it is not running")


def test_a_look_at_a_lock_keeps_no_run_from_starting(tmp_path):
    looking = (tmp_path / RUNNING).open("w")
    fcntl.flock(looking, fcntl.LOCK_SH)

    def look_away() -> None:
        time.sleep(0.05)
        looking.close()

    thread = threading.Thread(target=look_away)
    thread.start()
    take(tmp_path).close()
    thread.join()
