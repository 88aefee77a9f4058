"""Bodies of requests to the embedded server, in SGLang's names.

Strict: `"53"` and `true` are no token ids.  A list ends at its first error, or a long one of wrong
entries would take gigabytes of errors.
"""

from __future__ import annotations

from typing import Annotated, Any, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, FailFast, Field

from megatron_gpc.server.sampling import LONE_SURROGATE


class _FirstError(FailFast):
    def __hash__(self) -> int:  # typing.Union asks for it
        return 0


def _whole_characters(text: str) -> str:
    if LONE_SURROGATE.search(text):
        raise ValueError("has a lone surrogate, which is no character")
    return text


T = TypeVar("T")
List = Annotated[list[T], _FirstError()]
Text = Annotated[str, AfterValidator(_whole_characters)]
Name = Annotated[Text, Field(max_length=1024)]
Path = Annotated[Text, Field(max_length=4096)]
MOST_RANKS = 2**16


class Body(BaseModel):
    model_config = ConfigDict(strict=True)


class GenerateBody(Body):
    """POST /generate.  Single values ask for one prompt, lists for a batch."""

    text: Text | List[Text] | None = None
    input_ids: List[int] | List[List[int]] | None = None
    sampling_params: dict[str, Any] | List[dict[str, Any]] | None = None
    return_logprob: bool | List[bool] = False
    return_routed_experts: bool = False
    rid: Name | List[Name] | None = None
    stream: bool = False


class PauseBody(Body):
    mode: Any = "abort"
    """One of the generator's PauseMode; it says what is wrong with another."""


class AbortBody(Body):
    rid: Name = ""
    abort_all: bool = False


class DiskBody(Body):
    model_path: Path
    weight_version: Name | None = None
    abort_all_requests: bool = False


class TensorBody(Body):
    serialized_named_tensors: List[str]
    """One entry a tensor-parallel rank; this server is one rank and takes the first."""
    load_format: Name | None = None
    """`flattened_bucket`: the entry names memory of this host (weights/handles.py).  SGLang knows
    other formats."""
    weight_version: Name | None = None


class GroupBody(Body):
    master_address: Name
    master_port: Annotated[int, Field(ge=1, le=65535)]
    rank_offset: Annotated[int, Field(ge=1, lt=MOST_RANKS)]
    """Rank 0 is the trainer."""
    world_size: Annotated[int, Field(ge=2, le=MOST_RANKS)]
    group_name: Name = "weight_update_group"
    backend: Name = "nccl"


class DistributedBody(Body):
    names: List[Name]
    dtypes: List[Name]
    shapes: List[List[Annotated[int, Field(ge=0, lt=2**48)]]]
    group_name: Name = "weight_update_group"
    weight_version: Name | None = None


class GroupNameBody(Body):
    group_name: Name = "weight_update_group"


class VersionBody(Body):
    new_version: Name
    abort_all_requests: bool = False


class MemoryBody(Body):
    tags: List[Name] | None = None
    """Of `weights` and `kv_cache`; left out, both."""
