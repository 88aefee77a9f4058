"""A run that is killed and damaged ends as the undisturbed one; `make chaos` does it longer."""

from __future__ import annotations

import pytest
from chaos import DISK_BYTES, Event, campaign, full_disk, plan, small_disk

pytestmark = pytest.mark.timeout(900)  # the first test waits for the example's start


@pytest.mark.slow
def test_kills_and_a_damaged_checkpoint_leave_no_trace(warm_start, tmp_path):
    events = [
        Event("server", "begin", 0.3, steps=2),  # and then the launcher
        Event("rank", "begin", 0.1, steps=6, rank=1, flip=True),
    ]
    said: list[str] = []
    background = ["checkpoint.asynchronous=true"]
    assert campaign(warm_start, tmp_path, events, 12, 0, background, said.append) == []
    assert "1 damaged checkpoints" in said[-1], said


def test_a_plan_follows_from_its_seed_and_has_every_kind_of_event():
    events = plan(30, seed=0, disks=True)
    assert events == plan(30, seed=0, disks=True) != plan(30, seed=1, disks=True)
    kinds = [event.kind for event in events]
    assert [kinds.count(k) for k in ("rank", "launcher", "server", "disk")] == [10, 10, 10, 3]
    assert sum(event.flip for event in events) == 6
    assert {event.after for event in events} == {"launch", "begin"}
    assert all(event.free_bytes < DISK_BYTES for event in events)


def test_a_full_disk_is_full(tmp_path):
    with small_disk(tmp_path / "disk") as mounted:
        if not mounted:
            pytest.skip("mounting a tmpfs is not allowed here")
        run_dir = tmp_path / "disk" / "run"
        run_dir.mkdir()
        with full_disk(run_dir, free_bytes=8192), pytest.raises(OSError, match="No space left"):
            (run_dir / "large").write_bytes(bytes(2**20))
        (run_dir / "large").write_bytes(bytes(2**20))
