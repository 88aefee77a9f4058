"""Weights & Biases; offline (run_dir/wandb, for `wandb sync`) if no key is there."""

from __future__ import annotations

import os
import uuid
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

from megatron_gpc.metrics.sinks import page_id, tag


class WandbSink:
    """One page a run, the same when it is continued; `settings` go to wandb.init."""

    def __init__(self, run_dir: Path, config: Mapping[str, Any], resume_step: int, **settings: Any):
        wandb: Any = import_module("wandb")
        requests: Any = import_module("requests.utils")  # reads what `wandb login` leaves

        host = wandb.Settings().base_url
        has_key = os.environ.get("WANDB_API_KEY") or requests.get_netrc_auth(host)
        given = {"project": "megatron-gpc", "name": run_dir.name, "dir": run_dir}
        if "WANDB_MODE" not in os.environ:
            given["mode"] = "online" if has_key else "offline"
        given["id"] = page_id(run_dir, "wandb", lambda: uuid.uuid4().hex[:12])
        given["settings"] = wandb.Settings(console="off")  # our progress line stays as it is
        self._run = wandb.init(resume="allow", config=dict(config), **given | settings)
        self._run.define_metric("*", step_metric="step")  # wandb's own steps cannot go back

    def write(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log({"step": step} | {tag(name): value for name, value in values.items()})

    write_evaluation = write

    def close(self, ok: bool) -> None:
        self._run.finish(exit_code=0 if ok else 1)
