"""What a run saves in `common.pt`."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch


def _generators() -> dict[str, Any]:
    numpy_state = np.random.RandomState(0).get_state(legacy=False)
    numpy_state["state"]["key"] = numpy_state["state"]["key"].tolist()
    state = torch.Generator().get_state()
    return {
        "python": random.Random(0).getstate(),
        "numpy": numpy_state,
        "torch": state,
        "cuda": None,
        "tracker": {"model-parallel-rng": state},
    }


def common() -> dict[str, Any]:
    """Of a run on one rank, after its third step."""
    return {
        "train_state": {"step": 3, "sampling": {}, "controller": {}, "skipped": []},
        "updates": 6,
        "layout": {"tp": 1, "ranks": 1},
        "generators": [_generators()],
    }
