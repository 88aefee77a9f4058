"""The example against the real SGLang: every way of handing over, killed engines, export."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import httpx
import psutil
import pytest
import sglang_cpu
from commands import ROOT, command_line, launch, metrics, pids_using
from transformers import AutoTokenizer

from megatron_gpc.rollout.launcher import SGLangServer
from megatron_gpc.rollout.samples import read_samples, saved_steps

pytestmark = [
    pytest.mark.skipif(sglang_cpu.PYTHON is None, reason="run by make test-sglang"),
    pytest.mark.timeout(900),
]


@pytest.mark.parametrize("way", ["disk", "tensor", "distributed"])
def test_the_server_has_the_trainers_weights_after_every_hand_over(arguments, tmp_path, way):
    """fp32 at TP 2 x PP 2: log-probs of sampled tokens differ by rounding alone."""
    done = command_line(
        *arguments(tmp_path / "run", "train.steps=3", "parallel.tp=2", "parallel.pp=2"),
        *sglang_cpu.overrides(),
        f"rollout.server.sync={way}",
        "rollout.server.probe_tolerance=1e-4",
        timeout=400,
    )
    assert done.returncode == 0, done.stderr
    steps = metrics(tmp_path / "run")
    assert [step["weight_version"] for step in steps] == [0, 1, 2]
    assert max(step["logp_gap_max"] for step in steps) < 1e-4
    assert all(step["faults_restarts"] == 0 for step in steps)
    assert not pids_using(tmp_path / "run")


def test_engines_that_are_killed_come_back_and_every_prompt_is_accounted_for(arguments, tmp_path):
    run, kills = tmp_path / "run", 0
    command = [
        *arguments(run, "train.steps=24", "rollout.server.engines=2", "rollout.save_samples=true"),
        *sglang_cpu.overrides(),
    ]
    with (tmp_path / "out").open("w") as out:
        running = launch(command, stdout=out, stderr=out)
        try:
            deadline, seen = time.monotonic() + 600, 0
            while running.poll() is None:
                assert time.monotonic() < deadline, "the run hangs"
                steps = len(saved_steps(run))
                if steps >= seen + 6 and kills < 3:  # every few steps another one
                    engines = _servers(running.pid)
                    os.kill(engines[kills % len(engines)], signal.SIGKILL)
                    kills, seen = kills + 1, steps
                time.sleep(0.1)
        finally:
            running.kill()
            running.wait(30)
    assert running.returncode == 0, (tmp_path / "out").read_text()[-3000:]
    assert kills == 3 and len(metrics(run)) == 24
    positions = [p for step in saved_steps(run) for p in read_samples(run, step).positions]
    assert sorted(positions) == list(range(24 * 8)), "no prompt lost, none trained on twice"


def _servers(launcher: int) -> list[int]:
    """Pids of the SGLang servers below a launcher."""
    return [
        process.pid
        for process in psutil.Process(launcher).children(recursive=True)
        if "sglang.launch_server" in process.cmdline()
    ]


def test_an_exported_folder_is_served_as_it_is(start, tmp_path):
    megatron, out = tmp_path / "megatron", tmp_path / "hf"
    for tool, source, made in (
        ("convert_hf_to_megatron.py", ("--hf", start), megatron),
        ("convert_megatron_to_hf.py", ("--checkpoint", megatron), out),
    ):
        script = ROOT / "tools" / tool
        subprocess.run([sys.executable, script, *source, "--out", made], check=True, timeout=200)
    server = SGLangServer(
        "sglang.launch_server",
        sglang_cpu.PYTHON,
        {"model_path": out, **sglang_cpu.ARGS},
        sglang_cpu.ENVIRONMENT,
        tmp_path / "log",
        180.0,
    )
    with server:
        tokens = AutoTokenizer.from_pretrained(out)("500=")["input_ids"]
        params = {"temperature": 0, "max_new_tokens": 8}
        body = {"input_ids": tokens, "sampling_params": params}
        answer = httpx.post(f"{server.url}/generate", json=body, trust_env=False, timeout=60)
        assert "+" in answer.json()["text"], "the example's policy answers with a sum"
