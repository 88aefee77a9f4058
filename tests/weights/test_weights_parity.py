"""megatron-core computes what transformers computes, from the same files."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny_models import MODELS, Checkpoints, make_model

LARGEST = 2e-5
"""Logits are of size 1 to 10 in fp32; measured differences are below 1e-5."""


@pytest.fixture(scope="module")
def differences(
    checkpoints: Checkpoints, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, dict[str, float]]:
    """Model -> layout -> the largest difference of logits; one start of four processes for all."""
    for name in MODELS:
        tokens = torch.randint(0, 128, (2, 24), generator=torch.Generator().manual_seed(2))
        with torch.no_grad():
            logits = make_model(name)(tokens).logits
        torch.save({"tokens": tokens, "logits": logits}, checkpoints[name].folder / "logits.pt")
    out = tmp_path_factory.mktemp("parity") / "differences.json"
    worker = Path(__file__).with_name("megatron_logits.py")
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "4", "--standalone",
         str(worker), str(checkpoints.root), str(out)],
        env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
    return json.loads(out.read_text())


@pytest.mark.parametrize("name", MODELS)
def test_logits_are_those_of_transformers(
    name: str, differences: dict[str, dict[str, float]]
) -> None:
    assert differences[name]
    for layout, difference in differences[name].items():
        print(f"{name:28} {layout:8} {difference:.1e}")
        assert difference < LARGEST, layout
