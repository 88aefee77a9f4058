"""Variables of torchrun and srun that cannot be (see test_inputs.py)."""

from __future__ import annotations

import pytest
from hostile.outcomes import refused
from unit.test_preflight import job, start  # noqa: F401 - fixtures

TORCHRUN = {
    **{"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"},
    **{"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"},
}
ENVIRONMENT = {
    **{f"no {name}": ({**TORCHRUN, name: None}, name) for name in TORCHRUN if name != "RANK"},
    **{
        f"{name}={value!r}": ({**TORCHRUN, name: value}, name)
        for name, values in {
            "RANK": ("1", "-1", "x", "", "²", "1" * 5000, "0.0"),
            "WORLD_SIZE": ("0", "-4", "x", "1000000000000"),
            "LOCAL_RANK": ("-1", "x"),
            "MASTER_PORT": ("x", "0", "99999", "-1"),
            "MASTER_ADDR": ("", " ", "http://h", "a b"),
        }.items()
        for value in values
    },
    "tasks of srun without a node": (
        {"SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_NUM_NODES": "2"},
        "SLURM_NODEID is not set",
    ),
    "tasks of srun, no number": ({"SLURM_STEP_NUM_TASKS": "x"}, "SLURM_STEP_NUM_TASKS='x'"),
}


@pytest.mark.parametrize("entrance", [("train", "--dry-run"), ("train",)])
@pytest.mark.parametrize("name", ENVIRONMENT)
def test_an_environment_that_cannot_be_is_refused(job, capsys, monkeypatch, name, entrance):  # noqa: F811
    values, says = ENVIRONMENT[name]
    if "of srun" in name:
        job.overrides.append("parallel.dp=4")
    for variable, value in values.items():
        if value is not None:
            monkeypatch.setenv(variable, value)
    refused(capsys, says, lambda: job.command(*entrance))
