"""A real Slurm of four nodes on this host, for `make test-slurm`; needs root and Debian."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
from arithmetic_fixtures import arguments, reference, reference_run
from commands import ROOT

__all__ = ["arguments", "reference", "reference_run"]

MINI_SLURM = Path(__file__).parent / "mini-slurm"
ENDED = {"COMPLETED", "CANCELLED", "FAILED", "TIMEOUT", "NODE_FAIL", "PREEMPTED"}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.timeout(900))  # Slurm takes its time
            if "TEST_SLURM" not in os.environ:
                item.add_marker(pytest.mark.skip(reason="make test-slurm"))


class Cluster:
    """Submits jobs of this repository and watches them."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.jobs: list[str] = []
        self.environment = {
            **{k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "SBATCH_"))},
            "SLURM_CONF": str(folder / "etc" / "slurm.conf"),
            "MINI_SLURM_DIR": str(folder),
            "GPC_VENV": sys.prefix,
        }

    def nodes(self, *command: str) -> None:
        """mini-slurm start, stop, fail NODE, heal NODE."""
        done = subprocess.run([MINI_SLURM, *command], env=self.environment, timeout=300)
        if done.returncode == os.EX_UNAVAILABLE:
            pytest.skip("Slurm's packages cannot be installed here")
        done.check_returncode()

    def call(self, *command: str, check: bool = True) -> str:
        """A Slurm command's output."""
        done = subprocess.run(
            command, capture_output=True, text=True, env=self.environment, timeout=60, cwd=ROOT
        )
        assert not check or done.returncode == 0, done.stderr
        return done.stdout.strip()

    def submit(self, log: Path, *arguments: str, **environment: str) -> str:
        """sbatch; the job's number."""
        saved = self.environment
        self.environment = {**saved, **environment}
        try:
            job = self.call("sbatch", "--parsable", f"--output={log}", *arguments)
        finally:
            self.environment = saved
        self.jobs.append(job)
        return job

    def show(self, job: str) -> dict[str, str]:
        """What scontrol says of a job: JobState, Restarts, NodeList, ..."""
        text = self.call("scontrol", "show", "job", "--oneliner", job).splitlines()[0]
        return dict(re.findall(r"(\w+)=(\S*)", text))

    def wait(
        self, job: str, timeout_s: float = 400, until: Callable[[], bool] | None = None
    ) -> dict[str, str]:
        """Wait until the job has ended, or something is so; what scontrol says then."""
        deadline = time.monotonic() + timeout_s
        while True:
            shown = self.show(job)
            if shown["JobState"] in ENDED or (until is not None and until()):
                return shown
            assert time.monotonic() < deadline, f"job {job} is {shown['JobState']}"
            time.sleep(0.25)

    def processes_of(self, jobs: Sequence[str]) -> list[str]:
        """Command lines of processes that belong to jobs."""
        marks = [f"SLURM_JOB_ID={job}".encode() for job in jobs]
        found = []
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                variables = (folder / "environ").read_bytes().split(b"\0")
                if any(mark in variables for mark in marks):
                    found.append((folder / "cmdline").read_text().replace("\0", " "))
            except OSError:
                continue  # it ended while we looked
        return found


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    allowed = subprocess.run(["unshare", "--uts", "--mount", "--pid", "--net", "--fork", "true"])
    if allowed.returncode:
        pytest.skip("needs root, and leave to make namespaces")
    with tempfile.TemporaryDirectory(prefix="ms", dir="/tmp") as folder:  # sockets: a short path
        made = Cluster(Path(folder))
        made.nodes("start")
        try:
            yield made
        finally:
            made.nodes("stop")


@pytest.fixture(autouse=True)
def no_process_outlives_its_job(cluster) -> Iterator[None]:
    cluster.jobs.clear()
    yield
    for job in cluster.jobs:
        cluster.call("scancel", job, check=False)
    deadline = time.monotonic() + 30
    while left := cluster.processes_of(cluster.jobs):
        assert time.monotonic() < deadline, left
        time.sleep(0.5)
