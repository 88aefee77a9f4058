"""Where a run's numbers go: built-in sinks, one a file, and those that a user brings."""

from __future__ import annotations

import importlib
import importlib.util
import json
import tempfile
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from megatron_gpc.config import Config, LogConfig, parts
from megatron_gpc.config.file import plain
from megatron_gpc.errors import PartError, UserError
from megatron_gpc.run.files import read_json, replace_text

SINKS_KEY = "log.sinks"

SINKS = {
    "jsonl": "megatron_gpc.metrics.jsonl:JsonlSink",
    "tensorboard": "megatron_gpc.metrics.sinks.tensorboard:TensorBoardSink",
    "wandb": "megatron_gpc.metrics.sinks.wandb:WandbSink",
    "mlflow": "megatron_gpc.metrics.sinks.mlflow:MlflowSink",
    "swanlab": "megatron_gpc.metrics.sinks.swanlab:SwanlabSink",
}
INIT = ("wandb", "swanlab")
EXTRAS = (*INIT, "mlflow")
"""Those that need a library of their name, which is an optional extra of this package."""

START_S = 60.0
"""How long a sink may take to start when it is tried out [s]."""
PAGES = "pages.json"
"""In the run's folder: by which id each service knows the run."""

_GROUPS = {  # prefix of a metric's name -> its group
    "eval_": "eval",
    **dict.fromkeys(("reward", "groups_all_"), "reward"),
    **dict.fromkeys(("entropy", "share_e", "gradient_share_e", "dh_"), "entropy"),
    **dict.fromkeys(("clip_", "eps_", "ratio_"), "clip"),
    **dict.fromkeys(("seconds_", "tokens_per_second"), "time"),
    **dict.fromkeys(("response_", "truncated", "groups_", "samples_", "staleness_"), "rollout"),
    **dict.fromkeys(("weight_version", "logp_gap_", "correction_", "faults_"), "rollout"),
}


class MetricSink(Protocol):
    """What a class or a factory gives that is called with (run_dir, config, resume_step).

    `run_dir` is the run's folder, `config` its resolved configuration (a mapping of sections), and
    `resume_step` counts the finished steps of the checkpoint that the run continues from, 0 at
    first.  Steps after it may have been written before and come again.
    """

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """The metrics of a training step, counted from 1, by their names in metrics.jsonl."""
        ...

    def write_evaluation(self, step: int, values: Mapping[str, float]) -> None:
        """The evaluation of the policy after `step` finished steps."""
        ...

    def close(self, ok: bool) -> None:
        """Nothing more comes.  `ok` is False if the run ends by an error."""
        ...


METHODS = {
    "write": ("step", "values"),
    "write_evaluation": ("step", "values"),
    "close": ("ok",),
}


def check_sinks(log: LogConfig) -> None:
    """Refuse sinks that cannot work, without starting any.

    Raises:
        UserError: a library or a part is missing, or a signature does not fit.
    """
    for name in log.sinks:
        make = _factory(log, name)
        if isinstance(make, type):
            parts.check_methods(SINKS_KEY, name, make, METHODS, ("self",))
        if name in INIT:  # their arguments go there as they are
            init = importlib.import_module(name).init
            parts.check_call(SINKS_KEY, f"{name}.init", init, (), _arguments(log, name))


def try_out_sinks(config: Config) -> None:
    """Start the user's own sinks once, in an empty folder that is removed; they get no steps.

    Raises:
        UserError: one cannot be started, or not within START_S.
    """
    for name in config.log.sinks:
        if name in SINKS:
            continue
        failed: list[Exception] = []

        def start(folder: str, name: str = name, failed: list[Exception] = failed) -> None:
            try:
                make_sink(config.log, name, Path(folder), shown(config), 0)
            except (UserError, PartError) as error:
                failed.append(error)

        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
            thread = threading.Thread(target=start, args=(folder,), daemon=True)
            thread.start()
            thread.join(START_S)
        if thread.is_alive():
            raise UserError(f"{SINKS_KEY}: {name} has not started within {START_S:g} s")
        if failed:
            raise UserError(str(failed[0])) from failed[0]


def shown(config: Config) -> dict[str, Any]:
    """What a sink gets of a configuration: all but what may hold keys."""
    found = plain(config)
    found["sglang"].pop("environment")
    found["log"].pop("sinks_arguments")
    return found


def make_sink(log: LogConfig, name: str, *given: Any) -> MetricSink:
    """Start one; `given` is (run_dir, config, resume_step).

    Raises:
        UserError, PartError: it cannot be started.
    """
    make = _factory(log, name)
    with parts.blamed(SINKS_KEY, name, "its start"):
        sink = make(*given, **_arguments(log, name))
    parts.check_methods(SINKS_KEY, name, sink, METHODS)
    return sink


def _factory(log: LogConfig, name: str) -> Callable[..., MetricSink]:
    if name in EXTRAS:
        found = importlib.util.find_spec(name)
        if found is None or found.origin is None:  # a folder of that name is no library
            raise UserError(
                f"{SINKS_KEY}: {name} is not installed here: pip install 'megatron-gpc[{name}]'"
            )
    make = parts.find(SINKS_KEY, SINKS.get(name, name), {})
    positional = ("run_dir", "config", "resume_step")
    parts.check_call(SINKS_KEY, name, make, positional, _arguments(log, name))
    return make


def _arguments(log: LogConfig, name: str) -> Mapping[str, Any]:
    return log.sinks_arguments.get(name.rpartition(":")[2], {})


def tag(name: str) -> str:
    """A metric's name below its group, as pages show it: `entropy/dh_predicted`, `train/loss`."""
    groups = (group for prefix, group in _GROUPS.items() if name.startswith(prefix))
    return f"{next(groups, 'train')}/{name}"


def page_id(run_dir: Path, sink: str, make: Callable[[], str]) -> str:
    """By which id a service knows this run: made once, and the same when the run is continued."""
    file = run_dir / PAGES
    known = read_json(file) if file.exists() else {}
    if sink not in known:
        known[sink] = make()
        replace_text(file, json.dumps(known) + "\n")
    return known[sink]
