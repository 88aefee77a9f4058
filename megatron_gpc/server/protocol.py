"""Bodies of requests to the embedded server, in SGLang's names."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel


class GenerateBody(BaseModel):
    """POST /generate.  Single values ask for one prompt, lists for a batch."""

    text: str | list[str] | None = None
    input_ids: list[int] | list[list[int]] | None = None
    sampling_params: dict[str, Any] | list[dict[str, Any]] | None = None
    return_logprob: bool | list[bool] = False
    rid: str | list[str] | None = None
    stream: bool = False


class PauseBody(BaseModel):
    mode: Any = "abort"
    """One of the generator's PauseMode; it says what is wrong with another."""


class AbortBody(BaseModel):
    rid: str = ""
    abort_all: bool = False


class DiskBody(BaseModel):
    model_path: str
    weight_version: str | None = None
    abort_all_requests: bool = False


class TensorBody(BaseModel):
    serialized_named_tensors: list[str]
    """One entry a tensor-parallel rank; this server is one rank and takes the first."""
    load_format: str | None = None
    weight_version: str | None = None


class GroupBody(BaseModel):
    master_address: str
    master_port: int
    rank_offset: int
    world_size: int
    group_name: str = "weight_update_group"
    backend: str = "nccl"


class DistributedBody(BaseModel):
    names: list[str]
    dtypes: list[str]
    shapes: list[list[int]]
    group_name: str = "weight_update_group"
    weight_version: str | None = None


class GroupNameBody(BaseModel):
    group_name: str = "weight_update_group"


class VersionBody(BaseModel):
    new_version: str
    abort_all_requests: bool = False


class MemoryBody(BaseModel):
    tags: list[str] | None = None
    """Of `weights` and `kv_cache`; left out, both."""
