"""What would keep a run from working, found before anything is started or touched.

One check behind `train`, `train --dry-run`, `doctor --config`, `eval`, `serve` and
`estimate-memory`, so that none of them accepts what another refuses.  Every function raises
a UserError that names the key and the way out.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from megatron_gpc.algo.losses import Objective
from megatron_gpc.algo.schedules import check_schedule
from megatron_gpc.algo.target import check_target
from megatron_gpc.config import Config
from megatron_gpc.config.layout import check_batch, check_layout, model_parallel_size
from megatron_gpc.engines.starter import check_start
from megatron_gpc.errors import UserError
from megatron_gpc.mcore import cpu
from megatron_gpc.mcore.checkpoint.folder import checkpoints
from megatron_gpc.metrics.baseline import read_baseline
from megatron_gpc.metrics.jsonl import EVAL_NAME, FILE_NAME, read_metrics
from megatron_gpc.metrics.pass_at_k import pass_ks
from megatron_gpc.metrics.sinks import check_sinks, try_out_sinks
from megatron_gpc.rewards.judging import check_verifier
from megatron_gpc.rollout.prompt_reader import PromptReader
from megatron_gpc.rollout.prompts import PromptSource, refuse_changed
from megatron_gpc.run import environment
from megatron_gpc.run.files import check_regular, is_as_written
from megatron_gpc.run.folder import read_config
from megatron_gpc.run.lock import PREPARING, RUNNING
from megatron_gpc.types import Experts
from megatron_gpc.weights import check_reference, check_weights, family_of, replayed_experts
from megatron_gpc.weights.common_file import read_common
from megatron_gpc.weights.folders import COMMON, is_converted, read_hf_config

CHECKED_BYTES = 2**25
"""Of saved samples that are to be replayed, from the first step on."""
_FILES = ("config.yaml", FILE_NAME, EVAL_NAME, RUNNING, PREPARING, "stopped.json")
_OF_A_RUN = (RUNNING, PREPARING, FILE_NAME, "checkpoints", "attempts", "logs")
"""In a run's folder: its files; and what shows that it is one (also of a job, or of `serve`)."""
Say = Callable[[str], object]


def check_training(config: Config, say: Say, whole: bool = True) -> bool:
    """What `train` needs; of a model that model.build has yet to make, what is known without it.

    Args:
        say: is told what is not wrong, but should be known.
        whole: also read weights' headers and prompts, and look at what engines need.  Of several
            processes one does it.

    Returns:
        Whether the model is there; False: model.build has yet to make it, and is taken on trust.
    """
    check_writable("run_dir", config.run_dir)
    _check_run_folder(config)
    hf = _model(config)
    check_layout(config, hf, torch.cuda.is_available())
    check_batch(config, _data_parallel_size(config))
    check_reference(config, hf)
    experts = None if hf is None else replayed_experts(config, hf)
    Objective(config)  # calls it on a made-up example
    check_verifier(config.data)
    check_schedule(config.clip, config.train.steps)
    if hf is not None:
        check_target(config.clip, family_of(hf).model_fields(hf).vocab_size)
    check_sinks(config.log)
    if whole and not checkpoints(config.run_dir):  # a run that goes on does so without it
        try_out_sinks(config)
    if config.log.baseline is not None:
        read_baseline(config.log.baseline)
    pass_ks(config.eval)
    cpu.check_transformer_engine()
    if any((config.megatron.transformer, config.megatron.ddp, config.megatron.optimizer)):
        cpu.install()
        from megatron_gpc.mcore.native import check_overrides

        check_overrides(config, None if hf is None else family_of(hf).model_fields(hf))
    if config.rollout.replay is not None:
        _check_replay(config.rollout.replay, config, hf, experts)
    else:
        check_file("data.prompts", config.data.prompts, to_be_made=hf is None)
        if config.eval.prompts is not None:
            check_file("eval.prompts", config.eval.prompts, to_be_made=hf is None)
        if whole:
            check_start(config.rollout.server, config.sglang)
    if hf is None or not whole:
        return hf is not None
    check_weights(config.model.hf)
    if config.rollout.replay is None:
        reader = PromptReader(config, config.model.hf, say)
        training, held_out = reader.training(), reader.held_out()
        for prompts in (training, held_out):
            check_verifier(config.data, *prompts)
        if config.resume == "auto":
            source = PromptSource(training, config.seed)
            refuse_changed(source, _digest_so_far(config.run_dir), config.data)
    return True


def _digest_so_far(run_dir: Path) -> str | None:
    """The digest of the prompts in the checkpoint that a run continues from.

    None: there is none, or it is too damaged to tell, which is for resuming to say.

    Raises:
        UserError: it is not damaged, and not a run's.
    """
    for folder in reversed(checkpoints(run_dir)):
        try:
            return read_common(folder)["train_state"]["sampling"].get("prompts")
        except UserError:
            if is_as_written(folder, COMMON):
                raise
    return None


def check_evaluation(config: Config, model: Path, say: Say) -> None:
    """What `eval` needs, but for the checkpoint's weights.

    Args:
        model: Hugging Face folder or converted checkpoint with the configuration and the tokenizer.
        say: is told what is not wrong, but should be known.
    """
    assert config.eval.prompts is not None
    check_file("eval.prompts", config.eval.prompts)
    pass_ks(config.eval)
    check_start(config.rollout.server, config.sglang)
    check_verifier(config.data, *PromptReader(config, model, say).held_out())


def check_serving(config: Config) -> None:
    """What `serve` needs, but for its engines; the model may still be made meanwhile."""
    check_writable("run_dir", config.run_dir)
    file = config.rollout.server.urls_file
    if file is None:
        raise UserError("rollout.server.urls_file: say where `serve` is to write its addresses")
    if file.is_dir():
        raise UserError(f"rollout.server.urls_file: {file} is a folder; name a file")
    check_writable("rollout.server.urls_file", file.parent)
    model = config.model.hf
    if is_converted(model):
        raise UserError(
            f"model.hf: {model} is a converted checkpoint; engines start from a Hugging Face "
            "folder: convert it back, or give the one it was made of to `serve`"
        )
    if model.exists():
        _model(config)
        check_weights(model)


def check_file(key: str, file: Path, to_be_made: bool = False) -> None:
    """Refuse what is no file that can be read.

    Args:
        to_be_made: it may be absent.
    """
    try:
        if file.is_dir():
            raise UserError(f"{key}: {file} is a folder; name a file")
        if not file.exists():
            if to_be_made:
                return
            raise UserError(f"{key}: {file} is not there; make it, or name another file")
        if not file.is_file():
            raise UserError(f"{key}: {file} is no regular file; name one")
        file.open("rb").close()
    except OSError as error:
        raise UserError(f"{key}: {file}: cannot be read: {error.strerror}") from None


def check_writable(key: str, folder: Path) -> None:
    """Refuse what is no folder that can be written to, or made; nothing stays of the attempt."""
    there = folder
    try:
        while not there.exists() and not there.is_symlink():
            there = there.parent
        if not there.is_dir():
            what = "a file" if there.exists() else "a link to nothing"
            raise UserError(f"{key}: {there} is {what}; name a folder")
        with tempfile.TemporaryDirectory(prefix=".writable-", dir=there) as made:
            Path(made, folder.relative_to(there)).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        inside = f" in {there}" if there != folder else ""
        raise UserError(
            f"{key}: {folder} cannot be written{inside} ({error.strerror}); name another folder"
        ) from None


def _model(config: Config) -> dict[str, Any] | None:
    """The content of config.json; None where model.build has yet to make it."""
    model, build = config.model.hf, config.model.build
    try:
        there = model.exists()
    except OSError as error:
        raise UserError(f"model.hf: {model}: {error.strerror}") from None
    if build is not None and not there:
        check_file("model.build", build)
        check_writable("model.hf", model.parent)
        return None
    if not model.is_dir():
        what = "is a file" if there else "is not there"
        raise UserError(
            f"model.hf: {model} {what}; put the Hugging Face checkpoint's folder "
            "there (docs/recipes.md says how), or name another"
        )
    hf = read_hf_config(model)
    family_of(hf).model_fields(hf)
    return hf


def _data_parallel_size(config: Config) -> int:
    """As configured, or as the number of processes that torchrun has started makes it."""
    started = environment.number("WORLD_SIZE", 1, environment.MOST_PROCESSES, default=1)
    return config.parallel.dp or max(1, started // model_parallel_size(config.parallel))


def _check_run_folder(config: Config) -> None:
    """Refuse a run's folder in which a file has the place of a folder, or the other way round; and
    one that no run has made, if something of it would be replaced."""
    run_dir = config.run_dir
    began = any((run_dir / name).exists() for name in _OF_A_RUN)
    if environment.is_first() and not began:  # who prepares it; others may see it half made
        if config.resume == "none" and run_dir.is_dir() and any(run_dir.iterdir()):
            raise UserError(
                f"run_dir: {run_dir} is no run's folder, and resume=none would rename it; name "
                "another folder"
            )
        if (run_dir / "config.yaml").is_file() and config.resume == "auto":
            raise UserError(
                f"run_dir: {run_dir}/config.yaml is no run's, and would be replaced by one; name "
                "another folder"
            )
    if config.resume == "none":  # it is set aside
        _refuse_inside(config)
        return
    for name in _FILES:
        if (run_dir / name).is_symlink():
            raise UserError(
                f"run_dir: {run_dir / name} is a link, where a run has a file; remove it"
            )
    for name in ("checkpoints", "logs", "samples", "skipped", "sync", "tensorboard"):
        inner = config.run_dir / name
        if inner.is_symlink() or inner.exists():
            check_writable("run_dir", inner)
    for name in _FILES:
        check_regular(config.run_dir / name)
    for name in (FILE_NAME, EVAL_NAME):
        if (config.run_dir / name).exists():
            read_metrics(config.run_dir, name)
    if checkpoints(run_dir) and (run_dir / "config.yaml").exists():
        read_config(run_dir / "config.yaml")


def _refuse_inside(config: Config) -> None:
    """Refuse to set aside, with the run's folder, what the run starts from."""
    needed = {"data.prompts": config.data.prompts, "eval.prompts": config.eval.prompts}
    if config.model.build is None:
        needed["model.hf"] = config.model.hf
    for key, path in needed.items():
        if path is not None and path.exists() and path.is_relative_to(config.run_dir):
            raise UserError(
                f"run_dir: {config.run_dir}: resume=none would set aside {key}={path} with it; "
                "move that, or name another run_dir"
            )


def _check_replay(
    run_dir: Path, config: Config, hf: Mapping[str, Any] | None, experts: Experts | None
) -> None:
    from megatron_gpc.rollout.samples import (
        check_groups,
        check_routes,
        read_samples,
        samples_file,
        saved_steps,
    )

    if not run_dir.is_dir():
        what = "a file" if run_dir.exists() else "not there"
        raise UserError(f"rollout.replay: {run_dir} is {what}; name the folder of a run")
    saved = {*saved_steps(run_dir)}
    absent = next((k for k in range(1, config.train.steps + 1) if k not in saved), None)
    if absent:
        raise UserError(
            f"rollout.replay: {run_dir} has no samples of step {absent}, and train.steps="
            f"{config.train.steps}; lower train.steps, or name a run with rollout.save_samples=true"
        )
    vocabulary = math.inf if hf is None else family_of(hf).model_fields(hf).vocab_size
    size = 0
    for step in range(1, config.train.steps + 1):
        size += samples_file(run_dir, step).stat().st_size
        if step > 1 and size > CHECKED_BYTES:  # training checks the others when it comes to them
            break
        read = read_samples(run_dir, step)
        check_groups(read, config.rollout)
        check_routes(read, experts, run_dir)
        highest = max(max(*s.prompt.token_ids, *s.token_ids) for s in read.samples)
        if highest >= vocabulary:
            raise UserError(
                f"rollout.replay: {samples_file(run_dir, step)} has token {highest}, beyond the "
                f"model's vocabulary of {vocabulary}; name a run of the same model"
            )
