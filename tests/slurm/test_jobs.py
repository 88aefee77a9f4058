"""Jobs on a real Slurm: train on several nodes, serve on others, convert, evaluate."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from arithmetic_fixtures import ROUNDED
from commands import ROOT, metrics
from compare_runs import unequal_files

from megatron_gpc.mcore.checkpoint.folder import checkpoints

STEPS = 3


def close(run: Path, reference: dict[str, float]) -> bool:
    step = metrics(run)[0]
    return step["reward"] == reference["reward"] and all(
        step[name] == pytest.approx(reference[name], rel=tolerance)
        for name, tolerance in ROUNDED.items()
    )


def test_two_nodes_train_with_tensor_pipeline_and_data_parallelism(
    cluster, arguments, reference, tmp_path
):
    run, log = tmp_path / "run", tmp_path / "log"
    layout = ("parallel.tp=2", "parallel.pp=2", "parallel.dp=2", f"train.steps={STEPS}")
    job = cluster.submit(log, "--nodes=2", "slurm/train.sbatch", *arguments(run, *layout)[1:])
    shown = cluster.wait(job)
    assert shown["JobState"] == "COMPLETED", log.read_text()
    assert len(metrics(run)) == STEPS and close(run, reference)
    # An engine on every node, found through the file; four ranks on each.
    assert len((run / "attempts" / f"{job}.0" / "urls").read_text().split()) == 2
    assert "1: megatron-gpc: serving on http://10." in log.read_text()
    assert {file.name for file in (run / "logs").glob("rank_*.log")} == {
        f"rank_{number}.log" for number in range(1, 8)
    }
    kept = run / "attempts" / f"{job}.0"
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    assert (kept / "commit").read_text() == head.stdout
    assert "tp: 2" in (kept / "config.yaml").read_text()
    assert "SLURM_JOB_ID=" in (kept / "environment").read_text()
    assert (kept / "api_key").stat().st_mode & 0o777 == 0o600


def test_a_heterogeneous_job_serves_on_other_nodes_than_it_trains_on(
    cluster, arguments, reference, tmp_path
):
    run, log = tmp_path / "run", tmp_path / "log"
    job = cluster.submit(
        log,
        *(
            "slurm/train_disaggregated.sbatch",
            *arguments(run, "parallel.tp=2", "train.steps=2")[1:],
        ),
        A_TOKEN="on two lines\nnot-to-be-kept",
    )
    shown = cluster.wait(job)
    assert shown["JobState"] == "COMPLETED", log.read_text()
    assert len(metrics(run)) == 2 and close(run, reference)
    (url,) = (run / "attempts" / f"{job}.0" / "urls").read_text().split()
    trains_on = shown["NodeList"]
    assert "10.213.77." in url and not url.startswith(f"http://10.213.77.{trains_on[-1]}:")
    # An engine that the network reaches answers only to the job's key.
    assert "not-to-be-kept" not in (run / "attempts" / f"{job}.0" / "environment").read_text()


def test_the_smoke_job_passes(cluster, warm_start, tmp_path):
    run, log = tmp_path / "run", tmp_path / "log"
    given = f"run_dir={run}", f"model.hf={warm_start}", f"data.prompts={warm_start}/train.jsonl"
    job = cluster.submit(log, "slurm/smoke.sbatch", *given, "eval.prompts=null")
    assert cluster.wait(job)["JobState"] == "COMPLETED", log.read_text()
    assert len(metrics(run)) == 2
    assert "no problem found" in log.read_text()


def test_two_jobs_on_one_node_do_not_meet(cluster, arguments, tmp_path):
    shared = ("--exclusive=user", "--mem=1000", "--nodelist=node4", "slurm/train.sbatch")
    runs = [tmp_path / name for name in ("one", "other")]
    jobs = [
        cluster.submit(
            tmp_path / f"{run.name}.log",
            *shared,
            *arguments(run, "parallel.tp=2", "train.steps=2")[1:],
        )
        for run in runs
    ]
    for job, run in zip(jobs, runs, strict=True):
        shown = cluster.wait(job)
        assert shown["JobState"] == "COMPLETED", (tmp_path / f"{run.name}.log").read_text()
        assert shown["NodeList"] == "node4"
    assert not unequal_files(*(checkpoints(run)[-1] for run in runs))


def test_a_port_that_is_taken_is_passed_over(tmp_path):
    script = (
        "ROOT=.; source slurm/common.sh; SLURM_JOB_ID=7; scontrol() { echo localhost; }; "
        'find_each_other x; echo "$MASTER_PORT $ENGINE_PORT"'
    )

    def ports() -> list[int]:
        done = subprocess.run(
            ["bash", "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=60
        )
        assert done.returncode == 0, done.stderr
        return [int(port) for port in done.stdout.split()]

    import socket

    first = ports()
    assert first == ports() and first[1] == first[0] + 8 and 20000 <= first[0] < 32768
    with socket.create_server(("127.0.0.1", first[1])):
        assert not set(ports()) & set(first)


def test_a_users_way_from_a_hugging_face_folder_and_back_with_sbatch_alone(
    cluster, arguments, warm_start, tmp_path
):
    def submit(*command: str) -> str:
        log = tmp_path / f"{len(cluster.jobs)}.log"
        job = cluster.submit(log, *command)
        shown = cluster.wait(job)
        assert shown["JobState"] == "COMPLETED", log.read_text()
        return log.read_text()

    converted, run, exported = (tmp_path / name for name in ("converted", "run", "exported"))
    here = "--hf", str(warm_start), "--out", str(converted)
    submit("slurm/convert.sbatch", "hf_to_megatron", *here)
    submit(
        *("slurm/train.sbatch", *arguments(run, "train.steps=2", f"model.hf={converted}")[1:]),
    )
    newest = checkpoints(run)[-1]
    submit(
        *("slurm/convert.sbatch", "megatron_to_hf", "--checkpoint", str(newest)),
        *("--out", str(exported)),
    )
    from transformers import AutoModelForCausalLM

    assert AutoModelForCausalLM.from_pretrained(exported).num_parameters() > 0
    out = tmp_path / "eval.json"
    submit(
        *("slurm/eval.sbatch", *arguments(run, f"model.hf={exported}")[1:]),
        *(f"eval.prompts={warm_start}/heldout.jsonl", "eval.samples=4", "--out", str(out)),
    )
    assert 0 <= json.loads(out.read_text())["mean"] <= 1


def test_dry_run_shows_resources_and_the_resolved_configuration_and_makes_nothing(
    arguments, tmp_path
):
    run = tmp_path / "run"
    done = subprocess.run(
        ["bash", "slurm/train.sbatch", "--dry-run", *arguments(run, "clip.schedule=did")[1:]],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, "GPC_VENV": sys.prefix},
    )
    assert done.returncode == 0, done.stderr
    assert "#SBATCH --requeue" in done.stdout and "schedule: did" in done.stdout
    assert not run.exists()


def test_scripts_are_clean(tmp_path):
    shellcheck = str(Path(sys.prefix) / "bin" / "shellcheck")
    files = [
        *ROOT.glob("slurm/*.sbatch"),
        *ROOT.glob("slurm/*.sh"),
        ROOT / "tests/slurm/mini-slurm",
    ]
    done = subprocess.run([shellcheck, *files], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
