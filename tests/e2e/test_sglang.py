"""The example against the real SGLang: every way of handing over, its router, killed engines."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator

import httpx
import psutil
import pytest
import sglang_cpu
from commands import ROOT, command_line, launch, metrics, pids_using
from transformers import AutoTokenizer

from megatron_gpc.rollout.samples import read_samples, saved_steps

pytestmark = [
    pytest.mark.skipif(sglang_cpu.PYTHON is None, reason="run by make test-sglang"),
    pytest.mark.timeout(1500),
]
LAYOUT = ("parallel.tp=2", "parallel.pp=2")
STEPS, KILLS, PROMPTS_PER_STEP = 16, 3, 8


def test_engines_that_are_killed_come_back_and_every_prompt_is_accounted_for(arguments, tmp_path):
    run, kills, draw = tmp_path / "run", 0, random.Random(0)
    command = [
        *arguments(run, f"train.steps={STEPS}"),
        *sglang_cpu.overrides(),
        *("rollout.server.engines=2", "rollout.save_samples=true"),
    ]
    with (tmp_path / "out").open("w") as out:
        running = launch(command, stdout=out, stderr=out)
        try:
            deadline, due = time.monotonic() + 1200, draw.randint(2, 4)
            while running.poll() is None:
                assert time.monotonic() < deadline, "the run hangs"
                steps = len(saved_steps(run))
                if steps >= due and kills < KILLS and (engines := _servers(running.pid)):
                    os.kill(draw.choice(engines), signal.SIGKILL)
                    kills, due = kills + 1, steps + draw.randint(3, 6)
                time.sleep(0.1)
        finally:
            running.kill()
            running.wait(30)
    assert running.returncode == 0, (tmp_path / "out").read_text()[-3000:]
    found = metrics(run)
    assert kills == KILLS and len(found) == STEPS
    positions = [p for step in saved_steps(run) for p in read_samples(run, step).positions]
    assert sorted(positions) == list(range(STEPS * PROMPTS_PER_STEP)), "none lost, none twice"
    assert max(step["logp_gap_max"] for step in found) < 1e-4
    counts = {name: found[-1][name] for name in ("faults_restarts", "faults_retries")}
    print({"kills": kills, "prompts": len(positions), **counts})


def _servers(launcher: int) -> list[int]:
    """Pids of the SGLang servers below a launcher."""
    found = []
    for process in psutil.Process(launcher).children(recursive=True):
        try:
            if "sglang.launch_server" in process.cmdline():
                found.append(process.pid)
        except psutil.NoSuchProcess:
            continue  # it ended while we looked
    return found


@pytest.fixture(scope="module")
def exported(warm_start, tmp_path_factory):
    """A Hugging Face folder as tools/ export it."""
    folder = tmp_path_factory.mktemp("exported")
    megatron, out = folder / "megatron", folder / "hf"
    for tool, source, made in (
        ("convert_hf_to_megatron.py", ("--hf", warm_start), megatron),
        ("convert_megatron_to_hf.py", ("--checkpoint", megatron), out),
    ):
        script = ROOT / "tools" / tool
        subprocess.run([sys.executable, script, *source, "--out", made], check=True, timeout=400)
    return out


@pytest.fixture(scope="module")
def url(exported, tmp_path_factory) -> Iterator[str]:
    """SGLang, started from that folder, for all tests that do not kill it."""
    with sglang_cpu.server(exported, tmp_path_factory.mktemp("server") / "log") as server:
        yield server.url


def test_an_exported_folder_is_served_as_it_is(exported, url):
    tokens = AutoTokenizer.from_pretrained(exported)("500=")["input_ids"]
    body = {"input_ids": tokens, "sampling_params": {"temperature": 0, "max_new_tokens": 8}}
    answer = httpx.post(f"{url}/generate", json=body, trust_env=False, timeout=240)
    assert "+" in answer.json()["text"], "the example's policy answers with a sum"


@pytest.mark.parametrize(
    ("way", "router"),
    [("disk", False), ("tensor", False), ("distributed", False), ("distributed", True)],
    ids=["disk", "tensor", "distributed", "behind-router"],
)
def test_the_server_has_the_trainers_weights_after_every_hand_over(
    arguments, tmp_path, url, way, router
):
    """fp32 at TP 2 x PP 2: log-probs of sampled tokens differ by rounding alone."""
    if router and not sglang_cpu.has_router():
        pytest.skip("sglang-router is not installed")
    run = tmp_path / "run"
    done = command_line(
        *arguments(run, "train.steps=3", *LAYOUT),
        *sglang_cpu.overrides(),
        f"rollout.server.urls={url}",
        f"rollout.server.router={router}",
        f"rollout.server.sync={way}",
        "rollout.server.probe_tolerance=1e-4",
        timeout=1200,
    )
    assert done.returncode == 0, done.stderr
    steps = metrics(run)
    assert [step["weight_version"] for step in steps] == [0, 1, 2]
    assert max(step["logp_gap_max"] for step in steps) < 1e-4
    assert all(step["faults_retries"] == step["faults_malformed"] == 0 for step in steps)
    assert (run / "logs" / "router.log").exists() == router
    assert not pids_using(run)
