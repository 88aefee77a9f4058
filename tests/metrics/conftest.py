"""Run directories as a training run writes them, with made-up but plausible numbers."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from megatron_gpc import config as cfg
from megatron_gpc.algo.schedules import CheckedSchedule
from megatron_gpc.config.file import dump


def _lines(clip: cfg.ClipConfig, steps: int, made: int, seed: int) -> list[dict[str, float]]:
    noise = np.random.default_rng(seed).standard_normal((made, 4))
    schedule = CheckedSchedule(clip, steps)
    lines = []
    for k in range(made):
        entropy = 1.5 + (1.0 - (k / steps - 0.5) ** 2 * 4) * (clip.schedule == "id")
        bounds = schedule.bounds(k, entropy)
        line = {
            "step": k + 1,
            "loss": -0.01,
            "reward": 0.4 + 0.5 * k / steps + 0.02 * noise[k, 0],
            "entropy": entropy + 0.02 * noise[k, 1],
            "grad_norm": 0.4 + 0.1 * abs(noise[k, 2]),
            "ratio_mean": 1.0,
            "ratio_max": 2.0 + abs(noise[k, 3]),
            "clip_fraction_low": 0.02,
            "clip_fraction_high": 0.03,
            "share_e1": 0.3,
            "share_e2": 0.15,
            "share_e3": 0.2,
            "share_e4": 0.1,
            **{f"gradient_share_e{i}": 0.25 for i in (1, 2, 3, 4)},
            **{f"clip_fraction_e{i}": 0.01 * i for i in (1, 2, 3, 4)},
            **{f"dh_predicted_e{i}": 0.01 * (-1) ** (i + i // 4) for i in (1, 2, 3, 4)},
            "dh_predicted": 0.002 * noise[k, 0],
            "response_length": 7.5,
            "tokens_per_second": 800.0,
            "seconds_rollout": 1.5,
            "seconds_train": 1.0,
            "seconds_sync": 0.5,
            "weight_version": 8 * (k + 1),
        }
        for at, p in (("p0", 0.0), ("p05", 0.5), ("p1", 1.0)):
            line[f"eps_high_at_{at}"] = bounds.eps_high_at(p)
            line[f"eps_low_at_{at}"] = bounds.eps_low_at(p)
        line |= schedule.metrics()
        lines.append(line)
    return lines


@pytest.fixture
def write_run(tmp_path: Path):
    """write_run(name, schedule=..., seed=..., steps=..., made=..., evaluated=..., **clip keys)"""

    def write(name, schedule="id", seed=0, steps=100, made=None, evaluated=True, **clip_keys):
        folder = tmp_path / name
        folder.mkdir()
        clip = cfg.ClipConfig(schedule=schedule, **clip_keys)
        run = cfg.Config(
            run_dir=folder,
            seed=seed,
            clip=clip,
            train=cfg.TrainConfig(steps=steps),
            model=cfg.ModelConfig(hf=Path("/models/tiny")),
            data=cfg.DataConfig(prompts=Path("/data/prompts.jsonl"), verifier="addition"),
        )
        (folder / "config.yaml").write_text(dump(run))
        lines = _lines(clip, steps, steps if made is None else made, seed)
        if evaluated:
            evaluations = [
                {"step": 0, "eval_reward": 0.4, "eval_distinct_right": 20.0 + seed},
                {"step": len(lines), "eval_reward": 0.9, "eval_distinct_right": 30.0 + 2 * seed},
            ]
            (folder / "eval.jsonl").write_text(
                "".join(json.dumps(line) + "\n" for line in evaluations)
            )
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        return folder

    return write
