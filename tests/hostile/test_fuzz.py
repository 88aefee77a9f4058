"""Made-up configurations, safetensors files, saved samples and requests: accepted, or refused by a
UserError or a 4xx; 10,000 cases, about two minutes together.
"""

from __future__ import annotations

import json
from contextlib import suppress
from dataclasses import fields

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron_gpc.config import RolloutConfig
from megatron_gpc.config.file import keys, load
from megatron_gpc.config.layout import check_layout
from megatron_gpc.errors import UserError
from megatron_gpc.rollout.samples import SCHEMA, check_groups, read_samples, samples_file
from megatron_gpc.server.protocol import GenerateBody
from megatron_gpc.server.sampling import SamplingParams
from megatron_gpc.weights.hf_files import SINGLE, HFReader

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

EDGES = st.sampled_from([0, -1, 1, 2**31, 2**63, 2**64, 10**30, 1e308, 1e-320, "", "²", "\0", "~x"])
LEAVES = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | EDGES
VALUES = st.recursive(
    LEAVES,
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=5,
)
OFTEN = {"deadline": None, "suppress_health_check": list(HealthCheck), "database": None}


@settings(max_examples=4000, **OFTEN)
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


@settings(max_examples=3000, **OFTEN)
@given(HEADER.map(lambda h: json.dumps(h).encode()) | st.binary(max_size=80), st.integers(-2, 2))
def test_safetensors(tmp_path, header, off):
    length = max(len(header) + off, 0).to_bytes(8, "little")
    (tmp_path / SINGLE).write_bytes(length + header + bytes(range(64)))
    with suppress(UserError):
        reader = HFReader(tmp_path)
        for name in reader:
            with suppress(UserError):
                reader.get(name)


ROW = {
    **{"position": 0, "prompt_index": 0, "sample_index": 0, "prompt": "a", "label": "1"},
    **{"prompt_token_ids": [1], "token_ids": [2], "logprobs": [-1.0], "text": "b"},
    **{"finish_reason": "stop", "reward": 1.0, "right": True, "scores": "{}", "advantage": 0.0},
    "weight_versions": [{"version": "0", "start": 0, "end": 1}],
}
CELLS = {
    field.name: st.lists(LEAVES.filter(lambda v: not isinstance(v, str)), max_size=3)
    if pa.types.is_list(field.type)
    else LEAVES
    for field in SCHEMA
}


@settings(max_examples=1500, **OFTEN)
@given(st.lists(st.sampled_from([*CELLS]), max_size=2), st.data())
def test_saved_samples(tmp_path, changed, data):
    row = ROW | {name: data.draw(CELLS[name]) for name in changed}
    file = samples_file(tmp_path, 1)
    file.parent.mkdir(exist_ok=True)
    try:
        table = pa.table({name: pa.array([value, value]) for name, value in row.items()})
        pq.write_table(table, file)
    except (pa.ArrowException, OverflowError, UnicodeError, NotImplementedError):
        return  # there is no such file
    with suppress(UserError):
        check_groups(read_samples(tmp_path, 1), RolloutConfig(prompts_per_step=1, group_size=2))


PARAMS = st.dictionaries(
    st.sampled_from([*(field.name for field in fields(SamplingParams)), "x"]), VALUES, max_size=3
)
BODIES = st.dictionaries(
    st.sampled_from([*GenerateBody.model_fields, "x"]), VALUES, max_size=3
) | PARAMS.map(
    lambda params: {"input_ids": [53], "sampling_params": {"max_new_tokens": 2} | params}
)


@settings(max_examples=1500, **OFTEN)
@given(VALUES | BODIES)
def test_requests(client, body):
    content = json.dumps(body).encode()
    answer = client.post("/generate", content=content, headers={"Content-Type": "application/json"})
    assert answer.status_code == 200 or 400 <= answer.status_code < 500, answer.text
