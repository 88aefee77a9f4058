"""`megatron-gpc eval`: a checkpoint on held-out prompts, judged by the configured verifier.

Samples come from the same engines as in training (embedded, SGLang, or those that
rollout.server.urls names), which are given the checkpoint's weights.  No process group, no trainer:
one process beside its engines.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from rich.progress import track

from megatron_gpc.config import Config
from megatron_gpc.doctor.preflight import check_evaluation
from megatron_gpc.errors import UserError
from megatron_gpc.mcore.checkpoint.folder import checkpoints
from megatron_gpc.metrics.pass_at_k import pass_at_k, pass_ks
from megatron_gpc.rollout.evaluation import (
    as_evaluated,
    distinct_right,
    groups_of,
    nucleus,
    right_P,
    score_means,
)
from megatron_gpc.rollout.evaluation_file import evaluation_of, file_for
from megatron_gpc.rollout.prompt_reader import PromptReader
from megatron_gpc.rollout.sampler import Sampler, fleet_of
from megatron_gpc.run.files import SUMS, replace_text
from megatron_gpc.run.say import say
from megatron_gpc.types import Sample
from megatron_gpc.weights import check_weights
from megatron_gpc.weights.convert import find_hf, megatron_to_hf
from megatron_gpc.weights.folders import is_converted

PART = 2048
"""Samples asked for at a time, about; between parts the bar moves."""


def evaluate(config: Config, checkpoint: Path | None, out: Path | None) -> tuple[Path, dict]:
    """Evaluate a checkpoint and write what was found as JSON.

    Args:
        checkpoint: a Hugging Face folder, a converted one, a checkpoint of a run, or a run, of
            which the newest is taken; None: model.hf.
        out: file to write; None: see `evaluation_file.file_for`.

    Returns:
        (file, what stands in it): see `results`.

    Raises:
        UserError: checkpoint, prompts or verifier cannot be used, or `out` holds something else.
        RolloutError: the engines did not start, or gave no good answers.
    """
    if config.eval.prompts is None:
        raise UserError("eval.prompts is not set: name held-out prompts with eval.prompts=FILE")
    source = newest(checkpoint or config.model.hf)
    check_evaluation(config, model_of(source), lambda text: say(f"warning: {text}"))
    ks = pass_ks(config.eval)
    evaluation = evaluation_of(config, source)
    file = file_for(evaluation, config, out)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{file.parent}: cannot be written: {error.strerror}") from None
    again = "; it replaces the result of the same evaluation" if file.exists() else ""
    say(f"evaluating {source}; the result goes to {file}{again}")
    about, begin = evaluation.described(), time.monotonic()
    with (
        servable(source, file.parent) as folder,
        fleet_of(config, folder, file.parent / "logs" / file.stem) as fleet,
    ):
        sampler = Sampler(config, fleet, PromptReader(config, folder))
        sampler.read_weights(folder, source.name)
        say(f"evaluating {len(sampler.held_out)} x {config.eval.samples} held-out samples")
        samples = _sample(sampler, config.eval.samples)
    rollout = as_evaluated(config).rollout
    found = {
        **about,
        "verifier": config.data.verifier,
        "sampling": {
            "temperature": rollout.temperature,
            "max_response_tokens": rollout.max_response_tokens,
            "seed": config.seed,
            **nucleus(config),
        },
        "seconds": round(time.monotonic() - begin, 1),
        **results(samples, config.eval.samples, ks),
    }
    try:
        replace_text(file, json.dumps(found, indent=1) + "\n")
    except OSError as error:
        raise UserError(
            f"{file}: cannot be written: {error.strerror}; mean@{found['samples']} was "
            f"{found['mean']:.4f}, pass@k {found['pass']}"
        ) from None
    return file, found


def newest(folder: Path) -> Path:
    """The newest complete checkpoint of a run's folder; any other folder as it is.

    Raises:
        UserError: no such folder, or a run without a checkpoint.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: there is no such checkpoint folder")
    if not (folder / "checkpoints").is_dir():
        return folder
    found = checkpoints(folder)
    if not found:
        raise UserError(f"{folder} has no complete checkpoint yet (checkpoints/step_NNNNNN)")
    return found[-1]


def model_of(checkpoint: Path) -> Path:
    """The folder with the configuration and the tokenizer of a checkpoint.

    Raises:
        UserError: it is no checkpoint, or there is no such folder.
    """
    if (checkpoint / "config.json").is_file():
        return checkpoint
    if is_converted(checkpoint) or (checkpoint / ".metadata").is_file():
        return find_hf(checkpoint)
    raise UserError(
        f"{checkpoint} is no Hugging Face folder (config.json), no checkpoint of a run "
        "(RUN/checkpoints/step_NNNNNN) and no run"
    )


@contextmanager
def servable(checkpoint: Path, beside: Path) -> Iterator[Path]:
    """A Hugging Face folder with the checkpoint's weights, for the time of the block.

    Args:
        beside: where it is made, for what is none yet; engines elsewhere see the same path.

    Raises:
        UserError: the checkpoint is damaged, or none.
    """
    if (checkpoint / "config.json").is_file():
        check_weights(checkpoint)
        yield checkpoint
        return
    with tempfile.TemporaryDirectory(prefix=".evaluating-", dir=beside) as made:
        folder = Path(made) / "hf"
        try:
            hf = find_hf(checkpoint)
            kept = _keep(checkpoint, Path(made) / "kept")
            megatron_to_hf(kept, folder, hf=hf)
        except (OSError, UserError) as error:
            if checkpoint.is_dir():
                raise UserError(str(error).replace(f"{made}/kept", str(checkpoint))) from None
            raise UserError(
                f"{checkpoint} was removed while it was read: the run goes on, and checkpoint.keep "
                "says how many it keeps; evaluate a newer one"
            ) from None
        shutil.rmtree(Path(made) / "kept", ignore_errors=True)
        yield folder


def _keep(checkpoint: Path, folder: Path) -> Path:
    """The files of a run's checkpoint by second names, so that they stay if the run removes it.

    The checkpoint itself, where the file system does not give files second names.
    """
    if not (checkpoint / SUMS).is_file():
        return checkpoint  # no run removes it
    folder.mkdir()
    for file in checkpoint.iterdir():
        try:
            os.link(file, folder / file.name)
        except OSError:
            return checkpoint
    return folder


def _sample(sampler: Sampler, count: int) -> list[Sample]:
    prompts, size = sampler.held_out, max(1, PART // count)
    parts = [prompts[i : i + size] for i in range(0, len(prompts), size)]
    samples: list[Sample] = []
    for part in track(parts, "evaluating", transient=True):
        samples += sampler.held_out_samples(part)
    return samples


def results(samples: Sequence[Sample], count: int, ks: Sequence[int]) -> dict[str, Any]:
    """What is said of `count` samples of each prompt, given prompt by prompt.

    `mean` is the mean reward (mean@count), `pass` the mean over prompts of pass@k for every k,
    `scores` the mean of each further number of the verifier.
    """
    groups, right = groups_of(samples, count), right_P(samples, count)
    rewards = torch.tensor([s.reward for s in samples], dtype=torch.float64)
    return {
        "prompts": len(groups),
        "samples": count,
        "mean": float(rewards.mean()),
        "pass": {str(k): pass_at_k(right, count, k) for k in ks},
        "distinct_right": distinct_right(samples, count),
        "scores": score_means(samples, ""),
        "truncated": sum(s.finish_reason == "length" for s in samples) / len(samples),
        "mean_tokens": sum(len(s.token_ids) for s in samples) / len(samples),
        "by_prompt": [
            {"prompt": group[0].prompt.index, "label": group[0].prompt.label, "right": c}
            for group, c in zip(groups, right, strict=True)
        ],
    }
