"""What an engine would refuse is refused when the configuration is read."""

from __future__ import annotations

import pytest

from megatron_gpc.config.file import load
from megatron_gpc.errors import UserError

MINIMAL = "run_dir: runs/x\nmodel: {hf: start}\ndata: {prompts: p.jsonl, verifier: addition}\n"


@pytest.mark.parametrize(
    "override",
    [
        *(f"eval.top_k={value}" for value in (0, -2, 2**31, 2**70, 10**400, 1.5, ".nan", ".inf")),
        *(f"eval.top_p={value}" for value in (0, -1, 1.1, 10**400, ".nan", ".inf")),
        *(
            f"{name}.temperature={value}"
            for name in ("eval", "rollout")
            for value in (0, -1, 1e-7, 1e7, 10**400, ".nan", ".inf")
        ),
    ],
)
def test_sampling_parameters_have_the_engines_bounds(tmp_path, override):
    file = tmp_path / "config.yaml"
    file.write_text(MINIMAL)
    with pytest.raises(UserError) as refused:
        load(file, [override])
    assert override.partition("=")[0] in str(refused.value)


def test_what_stands_at_the_bounds_is_taken(tmp_path):
    file = tmp_path / "config.yaml"
    file.write_text(MINIMAL)
    taken = ["eval.top_k=2147483647", "eval.top_p=1", "eval.temperature=1e-6"]
    assert load(file, taken).eval.top_k == 2**31 - 1
