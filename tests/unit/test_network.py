"""What the doctor and the batch scripts are told of interfaces and adapters."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
from commands import ROOT

from megatron_gpc.run.network import AdapterPort, infiniband, interface_to


def test_the_interface_to_this_machine_is_its_loopback():
    assert interface_to("127.0.0.1") == ("lo", "127.0.0.1")


def test_a_name_without_address_has_no_interface():
    with pytest.raises(OSError):
        interface_to("nowhere.invalid")


def test_adapters_are_told_with_rate_and_state(tmp_path: Path):
    for adapter, state in ("mlx5_0", "4: ACTIVE"), ("mlx5_1", "1: DOWN"):
        port = tmp_path / adapter / "ports" / "1"
        port.mkdir(parents=True)
        (port / "state").write_text(f"{state}\n")
        (port / "rate").write_text("200 Gb/sec (4X HDR)\n")
    rate = "200 Gb/sec (4X HDR)"
    found = [AdapterPort("mlx5_0", rate, True), AdapterPort("mlx5_1", rate, False)]
    assert infiniband(tmp_path) == found


def test_a_batch_script_exports_the_interface_to_the_last_node():
    script = (
        "ROOT=.; source slurm/common.sh; SLURM_JOB_ID=7; "
        "scontrol() { printf '127.0.0.1\\n127.0.0.2\\n'; }; "
        'find_each_other x; echo "$GLOO_SOCKET_IFNAME $NCCL_SOCKET_IFNAME"'
    )
    left_out = ("GPC_INTERFACE", "NCCL_SOCKET_IFNAME")
    given = {name: value for name, value in os.environ.items() if name not in left_out}
    done = subprocess.run(
        ["bash", "-c", script],
        cwd=ROOT,
        env={**given, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.stdout == "lo lo\n", done.stderr
