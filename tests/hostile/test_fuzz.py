"""Made-up configurations and safetensors files: accepted, or refused by a UserError.

About a minute together.
"""

from __future__ import annotations

import json
from contextlib import suppress

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron_gpc.config.file import keys, load
from megatron_gpc.config.layout import check_layout
from megatron_gpc.errors import UserError
from megatron_gpc.weights.hf_files import SINGLE, HFReader

pytestmark = pytest.mark.slow

EDGES = st.sampled_from([0, -1, 1, 2**31, 2**63, 2**64, 10**30, 1e308, 1e-320, "", "²", "\0", "~x"])
LEAVES = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | EDGES
VALUES = st.recursive(
    LEAVES,
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=5,
)
OFTEN = {"deadline": None, "suppress_health_check": [HealthCheck.function_scoped_fixture]}


@settings(max_examples=100, **OFTEN)
@given(st.dictionaries(st.sampled_from(sorted(keys())), VALUES, max_size=3))
def test_configurations(tmp_path, values):
    file = tmp_path / "config.yaml"
    file.write_text("run_dir: r\nmodel: {hf: m}\ndata: {prompts: p, verifier: addition}\n")
    overrides = [f"{key}={json.dumps(value)}" for key, value in values.items()]
    with suppress(UserError):
        check_layout(load(file, overrides), None, cuda=True)


ENTRY = st.fixed_dictionaries(
    {},
    optional={
        "dtype": st.sampled_from(["F32", "BF16", "F16", "I64", "", 3, None]),
        "shape": st.lists(EDGES | st.integers(0, 4), max_size=3) | LEAVES,
        "data_offsets": st.lists(st.integers(-1, 64) | EDGES, max_size=3) | LEAVES,
    },
)
HEADER = st.dictionaries(
    st.sampled_from(["a", "b", "__metadata__", "é"]), ENTRY | VALUES, max_size=3
)


@settings(max_examples=1500, **OFTEN)
@given(HEADER.map(lambda h: json.dumps(h).encode()) | st.binary(max_size=80), st.integers(-2, 2))
def test_safetensors(tmp_path, header, off):
    length = max(len(header) + off, 0).to_bytes(8, "little")
    (tmp_path / SINGLE).write_bytes(length + header + bytes(range(64)))
    with suppress(UserError):
        reader = HFReader(tmp_path)
        for name in reader:
            with suppress(UserError):
                reader.get(name)
