"""SwanLab; offline (run_dir/swanlab, for `swanlab sync`) if no key is there."""

from __future__ import annotations

import os
import uuid
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

from megatron_gpc.metrics.sinks import page_id, tag


class SwanlabSink:
    """One page a run, the same when it is continued; `settings` go to swanlab.init."""

    def __init__(self, run_dir: Path, config: Mapping[str, Any], resume_step: int, **settings: Any):
        swanlab: Any = import_module("swanlab")

        given = {"project": "megatron-gpc", "name": run_dir.name, "log_dir": run_dir / "swanlab"}
        if "SWANLAB_MODE" not in os.environ:
            given["mode"] = "online" if swanlab.Settings().api_key else "offline"
        given["id"] = page_id(run_dir, "swanlab", lambda: uuid.uuid4().hex[:21])
        self._run = swanlab.init(resume="allow", config=dict(config), **given | settings)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log({tag(name): value for name, value in values.items()}, step=step)

    write_evaluation = write

    def close(self, ok: bool) -> None:
        end = {"state": "success"} if ok else {"state": "crashed", "error": "the run failed"}
        self._run.finish(**end)
