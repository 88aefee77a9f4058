"""A configuration under which clipping cannot act is said to be one."""

from __future__ import annotations

import pytest
from tiny import run_config

from megatron_gpc.config.file import warnings


@pytest.mark.parametrize(
    ("overrides", "inert"),
    [
        (["train.mini_batches=1", "train.epochs=1"], True),
        (["train.mini_batches=1", "train.epochs=2"], False),
        (["train.mini_batches=2", "train.epochs=1"], False),
        (["train.mini_batches=1", "train.epochs=1", "train.old_logprobs=rollout"], False),
    ],
)
def test_inert_clipping_is_warned_of(tmp_path, overrides, inert):
    said = warnings(run_config(tmp_path, tmp_path, *overrides))
    assert any("clipping is inert" in sentence for sentence in said) == inert
