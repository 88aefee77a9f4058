"""MLflow; in run_dir/mlflow.db unless MLFLOW_TRACKING_URI or `tracking_uri` names a server."""

import os
import time
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

from megatron_gpc.config.file import flatten
from megatron_gpc.metrics.sinks import page_id, tag


class MlflowSink:
    """One run of MLflow a run, the same when it is continued."""

    def __init__(self, run_dir: Path, config: Mapping[str, Any], resume_step: int,
                 experiment: str = "megatron-gpc", tracking_uri: str | None = None):  # fmt: skip
        mlflow: Any = import_module("mlflow")

        own = os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{run_dir}/mlflow.db"
        mlflow.set_tracking_uri(tracking_uri or own)
        self._made, self._client = mlflow.entities, mlflow.MlflowClient()
        self._id = page_id(run_dir, "mlflow", lambda: self._client.create_run(
            mlflow.set_experiment(experiment).experiment_id, run_name=run_dir.name
        ).info.run_id)  # fmt: skip
        texts = {f"config.{key}": str(value)[:500] for key, value in flatten(config).items()}
        tags = [self._made.RunTag(key, text) for key, text in texts.items()]
        self._client.log_batch(self._id, tags=tags)  # params could not change when it goes on
        self._client.update_run(self._id, status="RUNNING")

    def write(self, step: int, values: Mapping[str, float]) -> None:
        now, metric = int(time.time() * 1000), self._made.Metric
        metrics = [metric(tag(name), value, now, step) for name, value in values.items()]
        self._client.log_batch(self._id, metrics)

    write_evaluation = write

    def close(self, ok: bool) -> None:
        self._client.set_terminated(self._id, "FINISHED" if ok else "FAILED")
