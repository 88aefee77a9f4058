"""What a job outlives on a real Slurm, and what ends it."""

from __future__ import annotations

import json
import subprocess
import time
from pathlib import Path

import pytest
from commands import ROOT, command_line, metrics
from compare_runs import unequal_files, untimed

from megatron_gpc.mcore.checkpoint.folder import checkpoints
from megatron_gpc.run.stop import marker

STEPS = 12
TRAIN = "slurm/train.sbatch"


@pytest.fixture(scope="module")
def undisturbed(arguments, tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("undisturbed") / "run"
    done = command_line(*_arguments(arguments, run))
    assert done.returncode == 0, done.stderr
    return run


def _arguments(arguments, run: Path, *overrides: str) -> list[str]:
    return arguments(run, "parallel.tp=2", f"train.steps={STEPS}", "checkpoint.every=4", *overrides)


def _job(arguments, run: Path, *overrides: str) -> list[str]:
    return [TRAIN, *_arguments(arguments, run, *overrides)[1:]]


def _steps(run: Path) -> int:
    return len(metrics(run)) if (run / "metrics.jsonl").exists() else 0


def _same(run: Path, undisturbed: Path) -> bool:
    assert untimed(run / "metrics.jsonl") == untimed(undisturbed / "metrics.jsonl")
    return not unequal_files(checkpoints(run)[-1], checkpoints(undisturbed)[-1])


def test_scancel_ends_cancelled_with_a_checkpoint(cluster, arguments, tmp_path):
    run, log = tmp_path / "run", tmp_path / "log"
    job = cluster.submit(log, "--nodes=2", *_job(arguments, run, "checkpoint.every=0"))
    cluster.wait(job, until=lambda: _steps(run) >= 2)
    stacks = cluster.call(str(ROOT / "slurm" / "job.sh"), "stacks", job, str(run))
    assert "train.py" in stacks and all(f"rank_{n}.stacks" in stacks for n in (0, 1))
    seen = _steps(run)
    cluster.wait(job, until=lambda: _steps(run) > seen)  # it goes on
    cluster.call("scancel", job)
    shown = cluster.wait(job)
    assert shown["JobState"] == "CANCELLED" and shown["Restarts"] == "0", log.read_text()
    saved = checkpoints(run)
    assert len(saved) == 1, log.read_text()
    assert json.loads(marker(run).read_text())["step"] == _steps(run) < STEPS


def test_a_time_limit_and_preemption_lead_back_to_the_same_bytes(
    cluster, arguments, undisturbed, tmp_path
):
    run, log = tmp_path / "run", tmp_path / "log"
    limits = ("--partition=low", "--nodes=2", "--time=3", "--signal=B:USR1@60")
    job = cluster.submit(log, *limits, *_job(arguments, run))
    # Slurm may send the signal up to a minute early, or the run end before it: have it wait.
    cluster.wait(job, until=lambda: _steps(run) >= 2)
    first = _hold_until_asked(cluster, job, run, log)
    cluster.wait(job, until=lambda: _steps(run) >= first + 2)
    preempting = cluster.submit(
        tmp_path / "other", "--partition=high", "--nodes=4", "--exclusive", "--wrap=sleep 3"
    )
    assert cluster.wait(preempting)["JobState"] == "COMPLETED"
    shown = cluster.wait(job)
    assert shown["JobState"] == "COMPLETED", log.read_text()
    assert shown["Restarts"] == "2", log.read_text()
    starts = [line.split()[2] for line in (run / "attempts" / "log").read_text().splitlines()]
    assert starts[0] == "0" and int(starts[1]) == first and first < int(starts[2]) < STEPS
    assert _same(run, undisturbed)


def test_preemption_by_sigterm_leads_back_to_the_same_bytes(
    cluster, arguments, undisturbed, tmp_path
):
    run, log = tmp_path / "run", tmp_path / "log"
    settings = cluster.folder / "etc" / "slurm.conf"
    before = settings.read_text()
    settings.write_text(before.replace("SlurmctldParameters=preempt_send_user_signal", "#"))
    cluster.call("scontrol", "reconfigure")
    try:
        job = cluster.submit(log, "--partition=low", "--nodes=2", *_job(arguments, run))
        cluster.wait(job, until=lambda: _steps(run) >= 2)
        other = ("--partition=high", "--nodes=4", "--exclusive", "--wrap=sleep 3")
        preempting = cluster.submit(tmp_path / "other", *other)
        assert cluster.wait(preempting)["JobState"] == "COMPLETED"
        shown = cluster.wait(job)
    finally:
        settings.write_text(before)
        cluster.call("scontrol", "reconfigure")
    assert "asked to make room" not in log.read_text()
    assert shown["JobState"] == "COMPLETED" and shown["Restarts"] == "1", log.read_text()
    assert _same(run, undisturbed)


def _hold_until_asked(cluster, job: str, run: Path, log: Path) -> int:
    """Stop rank 0 until Slurm has asked the job to end; the step that it then saved."""
    pids = [
        int(folder.name)
        for folder in Path("/proc").glob("[0-9]*")
        if b"rank\0" in _read(folder / "cmdline") or b"train\0" in _read(folder / "cmdline")
        if b"SLURM_PROCID=0\0" in _read(folder / "environ")
        if f"SLURM_JOB_ID={job}\0".encode() in _read(folder / "environ")
        if b"python" in _read(folder / "cmdline")
    ]
    for pid in pids:
        subprocess.run(["kill", "-STOP", str(pid)], check=True)
    deadline = time.monotonic() + 180
    while "asked to make room" not in log.read_text():
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.25)
    for pid in pids:
        subprocess.run(["kill", "-CONT", str(pid)], check=True)
    cluster.wait(job, until=marker(run).exists)
    return json.loads(marker(run).read_text())["step"]


def _read(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError:
        return b""


def test_a_node_that_fails_in_mid_run_costs_only_what_was_not_saved(
    cluster, arguments, undisturbed, tmp_path
):
    run, log = tmp_path / "run", tmp_path / "log"
    job = cluster.submit(log, "--nodes=2", *_job(arguments, run))
    cluster.wait(job, until=lambda: bool(checkpoints(run)))
    node = cluster.show(job)["BatchHost"]
    victim = next(
        name for name in _hostnames(cluster, cluster.show(job)["NodeList"]) if name != node
    )
    cluster.nodes("fail", victim)
    try:
        shown = cluster.wait(job)
        assert shown["JobState"] == "COMPLETED" and shown["Restarts"] == "1", log.read_text()
        assert victim not in _hostnames(cluster, shown["NodeList"])
    finally:
        cluster.nodes("heal", victim)
    assert _same(run, undisturbed)


def _hostnames(cluster, nodes: str) -> list[str]:
    return cluster.call("scontrol", "show", "hostnames", nodes).split()


def test_a_run_that_makes_no_progress_is_not_tried_a_third_time(cluster, arguments, tmp_path):
    run, log = tmp_path / "run", tmp_path / "log"
    job = cluster.submit(log, *_job(arguments, run), GPC_PREFLIGHT="0")
    for attempt in range(2):  # asked to end before its first step
        said = f"attempt {attempt}, from step 0"
        cluster.wait(job, until=lambda said=said: said in _text(log))
        _await_engines(run, job, attempt)
        cluster.call("scancel", "--batch", "--signal=USR1", job)
    shown = cluster.wait(job)
    assert shown["JobState"] == "FAILED" and shown["Restarts"] == "2", log.read_text()
    assert "no progress: two attempts began at step 0" in log.read_text()


def test_attempts_are_capped(cluster, arguments, tmp_path):
    run, log = tmp_path / "run", tmp_path / "log"
    job = cluster.submit(log, *_job(arguments, run), GPC_PREFLIGHT="0", GPC_MAX_ATTEMPTS="1")
    cluster.wait(job, until=lambda: _steps(run) >= 1)
    cluster.call("scancel", "--batch", "--signal=USR1", job)
    shown = cluster.wait(job)
    assert shown["JobState"] == "FAILED" and "GPC_MAX_ATTEMPTS=1" in log.read_text()


def test_a_failure_is_not_tried_again_and_its_traceback_is_found(cluster, arguments, tmp_path):
    run, log = tmp_path / "run", tmp_path / "log"
    dead = "rollout.server.urls=http://127.0.0.1:9"
    job = cluster.submit(
        log, *_job(arguments, run, dead, "rollout.server.start_timeout_s=2"), GPC_PREFLIGHT="0"
    )
    shown = cluster.wait(job)
    assert shown["JobState"] == "FAILED" and shown["Restarts"] == "0"
    assert "not healthy after 2 s" in log.read_text()
    found = subprocess.run(
        ["bash", "slurm/job.sh", "traceback", str(run)],
        capture_output=True,
        text=True,
        env=cluster.environment,
        timeout=60,
    )
    assert found.returncode == 0 and "not healthy after 2 s" in found.stdout, found.stderr


def test_the_preflight_names_a_node_that_does_not_see_the_shared_folder(
    cluster, arguments, tmp_path
):
    run, log = tmp_path / "run", tmp_path / "log"
    run.mkdir()
    pid = (cluster.folder / "run" / "node2.pid").read_text().strip()
    inside = _child(int(pid))
    hide = ["nsenter", "-t", str(inside), "-m"]
    subprocess.run([*hide, "mount", "-t", "tmpfs", "none", str(run)], check=True)
    try:
        nodes = "--nodelist=node1,node2"
        job = cluster.submit(log, "--nodes=2", nodes, *_job(arguments, run))
        shown = cluster.wait(job)
    finally:
        subprocess.run([*hide, "umount", str(run)], check=True)
    assert shown["JobState"] == "FAILED", log.read_text()
    assert "node2" in log.read_text() and "--exclude=node2" in log.read_text()
    assert _steps(run) == 0


def _child(pid: int) -> int:
    """The first process inside a node: slurmd, child of the shell that the node is."""
    for _ in range(2):
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        pid = int(children[0])
    return pid


def _text(file: Path) -> str:
    return file.read_text() if file.exists() else ""


def _await_engines(run: Path, job: str, attempt: int) -> None:
    """Until ranks have begun, so that they are what the signal reaches."""
    deadline = time.monotonic() + 120
    while not (run / "lock").exists() or attempt != _attempts(run, job) - 1:
        assert time.monotonic() < deadline
        time.sleep(0.1)
    time.sleep(1.0)


def _attempts(run: Path, job: str) -> int:
    return _text(run / "attempts" / "log").count(f"{job} ")
