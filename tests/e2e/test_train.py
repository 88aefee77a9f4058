"""The example through the command line: layouts, launchers, bad input."""

from __future__ import annotations

import shutil
import subprocess
import sys
import time

import pytest
import warm
from arithmetic_fixtures import ROUNDED
from commands import CONFIG, ROOT, command_line, launch, metrics
from compare_runs import untimed

from megatron_gpc.cli import main
from megatron_gpc.run.network import free_port

pytestmark = pytest.mark.timeout(900)  # the first test waits for the example's start

# What a step gives before its first update is exact to fp32 rounding; later updates see weights
# that Adam has moved by rounding of near-zero gradients.
EXACT = {"reward", "response_length", "eps_high_at_p0", "eps_low_at_p1", "weight_version", "step"}


@pytest.mark.parametrize(
    "layout",
    [
        ["parallel.tp=2", "parallel.pp=2"],
        ["parallel.dp=2", "train.micro_batch_size=8"],
    ],
    ids=str,
)
def test_step_1_is_the_same_at_every_layout(arguments, reference, tmp_path, layout):
    done = command_line(*arguments(tmp_path / "run", "train.steps=1", *layout))
    assert done.returncode == 0, done.stderr
    (step,) = metrics(tmp_path / "run")
    assert {name: step[name] for name in EXACT} == {name: reference[name] for name in EXACT}
    for name, tolerance in ROUNDED.items():
        assert step[name] == pytest.approx(reference[name], rel=tolerance), name


def test_users_start_the_run_that_these_tests_start(arguments, reference, tmp_path):
    with warm.cold():
        done = command_line(*arguments(tmp_path / "run", "train.steps=1"))
    assert done.returncode == 0, done.stderr
    (step,) = metrics(tmp_path / "run")
    names = EXACT | ROUNDED.keys()
    assert {name: step[name] for name in names} == {name: reference[name] for name in names}


def test_plot_draws_one_run_and_overlays_two(reference_run, tmp_path, capsys):
    assert (reference_run / "plots.png").stat().st_size > 10_000, "drawn at the run's end"
    other = tmp_path / "other"
    shutil.copytree(reference_run, other)
    config = other / "config.yaml"
    config.write_text(config.read_text().replace("schedule: id", "schedule: static"))
    out = tmp_path / "both.png"
    done = command_line("plot", str(reference_run), str(other), "--out", str(out))
    assert done.returncode == 0 and out.stat().st_size > 10_000
    assert "id" in done.stdout and "static" in done.stdout
    assert main(["plot", str(tmp_path / "nothing")]) == 2
    assert "no such file" in capsys.readouterr().err


@pytest.mark.slow
def test_torchrun_starts_the_same_run(arguments, reference, tmp_path):
    done = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2"),
            *("--master-addr=127.0.0.1", f"--master-port={free_port()}", "-m", "megatron_gpc"),
            *arguments(tmp_path / "run", "train.steps=1", "parallel.tp=2"),
        ],
        capture_output=True,
        text=True,
        timeout=200,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr
    (step,) = metrics(tmp_path / "run")
    assert step["entropy"] == pytest.approx(reference["entropy"], rel=1e-6)
    assert step["reward"] == reference["reward"]


def test_samples_from_weights_sent_as_tensors_are_the_same_and_trained_on_again_to_the_last_bit(
    arguments, reference, tmp_path, capsys
):
    first, again = tmp_path / "first", tmp_path / "again"
    steps = "train.steps=2"
    sent = "rollout.server.sync=tensor"
    done = command_line(*arguments(first, steps, sent, "rollout.save_samples=true"))
    assert done.returncode == 0, done.stderr
    one, two = metrics(first)
    assert one["entropy"] == reference["entropy"]
    assert two["weight_version"] == 1
    for step in (one, two):
        assert step["logp_gap_max"] < 1e-4, "server and trainer have the same weights"
    done = command_line(*arguments(again, steps, f"rollout.replay={first}", "eval.every=1"))
    assert done.returncode == 0, done.stderr
    steps_of_both = (untimed(run / "metrics.jsonl") for run in (first, again))
    for one, other in zip(*steps_of_both, strict=True):
        assert other.items() <= one.items()
        assert other.keys() >= {"loss", "entropy", "grad_norm", "reward", "share_e1"}
    assert not (again / "logs" / "server.log").exists()
    assert main(["samples", str(first), "--step", "2", "--limit", "3"]) == 0
    assert "step 2: 3 of 64 samples" in capsys.readouterr().out
    refused = command_line(*arguments(again, "train.steps=3", f"rollout.replay={first}"))
    assert refused.returncode == 2 and "no samples of step 3" in refused.stderr


def test_a_step_whose_answers_were_all_cut_and_dropped_makes_no_update(arguments, tmp_path):
    given = ("train.steps=1", "rollout.max_response_tokens=2", "rollout.overlong=drop")
    done = command_line(*arguments(tmp_path / "run", *given))
    assert done.returncode == 0, done.stderr
    said = " ".join((done.stdout + done.stderr).split())
    assert "step 1: every response was cut" in said and "no update" in said
    (step,) = metrics(tmp_path / "run")
    assert step["updates"] == 0 and step["truncated"] == 1


@pytest.mark.slow
def test_engines_and_policy_that_take_turns_give_the_same_run(arguments, tmp_path):
    runs = [tmp_path / "beside", tmp_path / "turns"]
    for run, colocated in zip(runs, ("false", "true"), strict=True):
        given = arguments(run, "train.steps=2", "rollout.server.sync=tensor", "parallel.dp=2")
        done = command_line(*given, f"rollout.server.colocated={colocated}")
        assert done.returncode == 0, done.stderr
    assert untimed(runs[0] / "metrics.jsonl") == untimed(runs[1] / "metrics.jsonl")
    log = (runs[1] / "logs" / "server.log").read_text().splitlines()
    turn = ["released kv_cache weights", "resumed weights", "resumed kv_cache"]
    assert [line for line in log if line.startswith(("released ", "resumed "))] == 3 * turn
    assert all(step["faults_restarts"] == 0 for step in metrics(runs[1]))


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["clip.shedule=id"], "did you mean 'clip.schedule'"),
        (["parallel.tp=3"], "parallel.tp=3 does not divide"),
        (["parallel.vpp=2"], "needs parallel.pp > 1"),
        (["data.verifier=foo"], "expected math, addition, or a part of your own"),
        (["model.hf=/nowhere", "model.build=null"], "model.hf: /nowhere is not there"),
        (["megatron.transformer.num_layers=8"], "it follows from model.hf"),
        (["data.prompts=/nowhere.jsonl"], "data.prompts: /nowhere.jsonl is not there"),
    ],
    ids=lambda v: v[0] if isinstance(v, list) else None,
)
def test_bad_input_ends_with_code_2_and_one_clear_line(
    arguments, tmp_path, capsys, overrides, says
):
    assert main(arguments(tmp_path / "run", "train.steps=1", *overrides)) == 2
    said = capsys.readouterr().err.strip()
    assert says in said and "\n" not in said
    assert not (tmp_path / "run").exists()


def test_prompts_that_cannot_be_used_end_with_code_2_and_no_traceback(arguments, tmp_path):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("no JSON\n")
    run = tmp_path / "run"
    done = command_line(*arguments(run, "train.steps=1", f"data.prompts={prompts}"))
    assert done.returncode == 2
    assert f"{prompts}:1: not JSON" in done.stderr and "Traceback" not in done.stderr


def test_an_unreachable_server_ends_with_code_1_and_one_clear_line(arguments, tmp_path):
    url = f"http://127.0.0.1:{free_port()}"
    server = (f"rollout.server.urls={url}", "rollout.server.start_timeout_s=1")
    done = command_line(*arguments(tmp_path / "run", "train.steps=1", *server))
    assert done.returncode == 1
    assert f"megatron-gpc: rollout server: {url}: not healthy after 1 s" in done.stderr
    assert "Traceback" not in done.stderr


def test_dry_run_prints_the_resolved_configuration_and_makes_nothing(arguments, tmp_path, capsys):
    assert main([*arguments(tmp_path / "run", "clip.schedule=did"), "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert "schedule: did" in said and "eps_low: 0.2" in said
    assert not (tmp_path / "run").exists()


def test_the_example_configuration_needs_no_model_to_be_read():
    assert main(["train", str(CONFIG), "model.hf=/nowhere/start", "--dry-run"]) == 0


def test_two_runs_never_share_a_folder(arguments, tmp_path):
    first = launch(
        arguments(tmp_path / "run", "train.steps=40"),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        deadline = time.monotonic() + 100
        while not (tmp_path / "run" / "metrics.jsonl").exists():
            assert time.monotonic() < deadline
            time.sleep(0.1)
        second = command_line(*arguments(tmp_path / "run", "train.steps=40"))
        assert second.returncode == 2 and "is in use by a run" in second.stderr
    finally:
        first.kill()
        first.wait(10)
