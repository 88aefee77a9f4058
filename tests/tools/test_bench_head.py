"""tools/bench/head.py: every way agrees with the first, and the object that it prints."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys

import pytest
import torch
from commands import ROOT

BENCH = ROOT / "tools" / "bench" / "head.py"
FIGURES = {"seconds_forward", "seconds_both", "extra_bytes"}


def test_every_way_gives_the_numbers_of_the_first():
    spec = importlib.util.spec_from_file_location("bench_head", BENCH)
    assert spec is not None and spec.loader is not None
    bench = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(bench)
    found = {
        way: bench.measure(way, 48, 32, 1500, torch.float32)
        for way in ("matmuls", *bench.WAYS)
        if way != "compiled" and way not in bench.OTHERS
    }
    assert all(result.keys() >= FIGURES for result in found.values())
    assert list(bench.disagreements(found)) == []
    found["fused"]["weight_grad"] *= 1.1
    (told,) = bench.disagreements(found)
    assert "weight_grad" in told and "fused" in told
    assert [*bench.disagreements({"naive": found["naive"], "liger": {"logp": 0.0}})]


@pytest.mark.slow
def test_it_prints_one_object_way_by_way():
    sizes = ("--tokens", "64", "--hidden", "32", "--vocab", "3000")
    done = subprocess.run(
        [sys.executable, BENCH, *sizes, "--json"], capture_output=True, text=True, timeout=280
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found.keys() >= {"matmuls", "naive", "compiled", "checkpointed", "logits", "fused"}
    assert all(result.keys() >= FIGURES for result in found.values()), found
