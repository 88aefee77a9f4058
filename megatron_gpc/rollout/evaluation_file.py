"""Where `megatron-gpc eval` writes: one file an evaluation, and none over another's.

Two evaluations are the same if weights, prompts and settings are; an `id` made of these three
stands in the file and, unless --out gives another, in its name.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_gpc.config import Config
from megatron_gpc.config.file import plain
from megatron_gpc.config.plain_yaml import read_mapping
from megatron_gpc.errors import UserError
from megatron_gpc.rollout.evaluation import as_evaluated
from megatron_gpc.run.files import SUMS, read_json, sha256

_DATA = ("chat_template", "max_prompt_tokens", "too_long")
_ROLLOUT = ("temperature", "max_response_tokens", "stop")
_NOT_EVAL = ("prompts", "every", "temperature", "max_response_tokens")  # the last two: as_evaluated


@dataclass(frozen=True)
class Evaluation:
    """What is evaluated on what, and how."""

    checkpoint: Path
    run: Path | None
    """Folder of the run that saved the checkpoint; None where no run did."""
    weights: str
    """Changes when they do: a digest of the checksums, or of the files' sizes and times."""
    prompts: Path
    prompts_sha256: str
    settings: dict[str, Any]

    @property
    def id(self) -> str:
        what = [
            "" if self.run else str(self.checkpoint),
            *(self.weights, self.prompts_sha256, self.settings),
        ]
        return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:8]

    def described(self) -> dict[str, Any]:
        """For the file."""
        run = None
        if self.run is not None:
            content = read_mapping(self.run / "config.yaml")
            run = {"folder": str(self.run), "config": content}
        return {
            "evaluation": self.id,
            "checkpoint": str(self.checkpoint),
            "weights": self.weights,
            "run": run,
            "prompts_file": str(self.prompts),
            "prompts_sha256": self.prompts_sha256,
            "settings": self.settings,
        }


def evaluation_of(config: Config, checkpoint: Path) -> Evaluation:
    """
    Args:
        checkpoint: a complete one, or a Hugging Face folder.

    Raises:
        UserError: the prompts cannot be read.
    """
    checkpoint, prompts = checkpoint.resolve(), config.eval.prompts
    assert prompts is not None
    try:
        digest = sha256(prompts)
    except OSError as error:
        raise UserError(f"eval.prompts: {prompts}: cannot be read: {error.strerror}") from None
    content = plain(as_evaluated(config))
    settings = {
        **{key: content["data"][key] for key in ("verifier", "verifier_arguments", "right_at")},
        **{key: content["data"][key] for key in _DATA},
        "seed": config.seed,
        "engines": content["rollout"]["server"]["kind"],
        **{key: content["rollout"][key] for key in _ROLLOUT if key in content["rollout"]},
        **{key: value for key, value in content["eval"].items() if key not in _NOT_EVAL},
    }
    run = checkpoint.parent.parent
    of_run = checkpoint.parent.name == "checkpoints" and (run / "config.yaml").is_file()
    weights = _digest_of_weights(checkpoint)
    return Evaluation(checkpoint, run if of_run else None, weights, prompts, digest, settings)


def _digest_of_weights(checkpoint: Path) -> str:
    if (checkpoint / SUMS).is_file():
        return sha256(checkpoint / SUMS)
    files = [*checkpoint.glob("*.safetensors"), *checkpoint.glob("*.distcp")]
    seen = sorted((f.name, f.stat().st_size, f.stat().st_mtime_ns) for f in files)
    return hashlib.sha256(json.dumps(seen).encode()).hexdigest()


def file_for(evaluation: Evaluation, config: Config, out: Path | None) -> Path:
    """The file to write: in the run that is evaluated, or else beside the configuration's run.

    Raises:
        UserError: `out` is a folder, or holds something else than this evaluation's result.
    """
    if out is None:
        run = evaluation.run
        folder = (run if run else config.run_dir.absolute().parent) / "evaluations"
        stem = evaluation.prompts.stem[:40]
        return folder / f"{evaluation.checkpoint.name}-{stem}-{evaluation.id}.json"
    if out.is_dir():
        raise UserError(f"--out: {out} is a folder; name the JSON file to write")
    if out.exists():
        try:
            there = read_json(out)["evaluation"]
        except (UserError, KeyError):
            there = None
        if there != evaluation.id:
            raise UserError(
                f"--out: {out} is there already and holds "
                f"{'another evaluation' if there else 'no evaluation that could be told from this'}"
                "; remove it, or name another file"
            )
    return out
