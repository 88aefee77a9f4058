"""Client of an inference server with SGLang's HTTP interface: the real one or the embedded one.

Checks every answer before it may become training data.  Imports no torch.
"""

from __future__ import annotations

import asyncio
import base64
import pickle
import random
import uuid
from collections import deque
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import httpx
from tenacity import (
    AsyncRetrying,
    RetryCallState,
    retry_if_exception_type,
    stop_after_attempt,
)

from megatron_gpc.engines.answers import (
    Generation,
    MalformedAnswer,
    RequestRefused,
    ServerUnavailable,
    answer_json,
    error_message,
    read_generation,
)
from megatron_gpc.types import Experts

if TYPE_CHECKING:
    import torch

HEALTH_TIMEOUT_S = 30.0
"""SGLang's /health takes 20 s to say no."""
HEALTH_POLL_S = 0.5


@dataclass(frozen=True)
class SampleRequest:
    """One sample to be drawn.  `sampling_params` in SGLang's names, with n left out or 1."""

    input_ids: Sequence[int]
    sampling_params: dict[str, Any]
    rid: str | None = None
    experts: Experts | None = None
    """If it is to be told which of them the tokens went to."""


class SGLangClient:
    """Asynchronous client; belongs to one event loop; `close` it there.

    A call asks once; `retrying` asks again.  Every call may raise:
        ServerUnavailable: no connection, no answer in time, or 5xx.
        RequestRefused: 4xx.
        MalformedAnswer: an answer that cannot be true.

    Args:
        base_url: such as http://127.0.0.1:30000.
        timeout_s: deadline of one call, from sending to the last byte of the answer [s].
        max_in_flight: samples that are asked for at the same time.
        api_key: sent as bearer token.
        batched: whether a POST may ask for several samples; sglang-router takes one.
    """

    def __init__(
        self,
        base_url: str,
        *,
        timeout_s: float,
        max_in_flight: int,
        api_key: str | None = None,
        batched: bool = True,
    ):
        headers = {} if api_key is None else {"Authorization": f"Bearer {api_key}"}
        self._base_url = base_url.rstrip("/")
        self._timeout_s = timeout_s
        self._max_in_flight = max_in_flight
        self._batched = batched
        self._in_flight = 0
        self._queue: deque[tuple[int, asyncio.Future[None]]] = deque()
        # No proxies from the environment; deadlines are kept by _request, for the whole exchange.
        self._http = httpx.AsyncClient(
            base_url=self._base_url,
            headers=headers,
            trust_env=False,
            timeout=None,
            limits=httpx.Limits(max_connections=None),
        )

    async def close(self) -> None:
        await self._http.aclose()

    # ---- generation ----

    async def generate(self, requests: Sequence[SampleRequest]) -> list[Generation]:
        """One sample a request, in the requests' order, in few HTTP posts if `batched`.

        Raises:
            MalformedAnswer: names the request's rid.
        """
        # All at once if allowed; else in parts, so that new ones can start when some end.
        size = self._max_in_flight
        if len(requests) > size:
            size = max(1, size // 4)
        if not self._batched:
            size = 1
        parts = [requests[i : i + size] for i in range(0, len(requests), size)]
        try:
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(self._generate_part(part)) for part in parts]
        except ExceptionGroup as failures:
            raise failures.exceptions[0] from None
        return [generation for task in tasks for generation in task.result()]

    async def _generate_part(self, requests: Sequence[SampleRequest]) -> list[Generation]:
        rids = [request.rid or uuid.uuid4().hex for request in requests]
        lists = {
            "input_ids": [list(request.input_ids) for request in requests],
            "sampling_params": [request.sampling_params for request in requests],
            "rid": rids,
        }
        given = lists if self._batched else {name: one for name, (one,) in lists.items()}
        async with self._reserved(len(requests)):
            body = {**given, "return_logprob": True}
            if any(request.experts for request in requests):
                body["return_routed_experts"] = True
            found = answer_json(await self._request("POST", "/generate", body))
        answers = found if self._batched else [found]
        if not isinstance(answers, list) or len(answers) != len(requests):
            raise MalformedAnswer(
                f"requests {rids[0]} and following: expected {len(requests)} answers"
            )
        return [
            read_generation(
                answer, rid, request.sampling_params, len(request.input_ids), request.experts
            )
            for answer, rid, request in zip(answers, rids, requests, strict=True)
        ]

    @asynccontextmanager
    async def _reserved(self, count: int) -> AsyncIterator[None]:
        turn = asyncio.get_running_loop().create_future()
        self._queue.append((count, turn))
        self._admit()
        try:
            await turn
            yield
        finally:
            if turn.done() and not turn.cancelled():
                self._in_flight -= count
            self._admit()

    def _admit(self) -> None:
        """First come, first served: one waits while there is no room for those before it."""
        while self._queue and (
            self._queue[0][1].cancelled()
            or self._in_flight + self._queue[0][0] <= self._max_in_flight
        ):
            count, turn = self._queue.popleft()
            if not turn.cancelled():
                self._in_flight += count
                turn.set_result(None)

    # ---- state ----

    async def health(self) -> bool:
        """Whether the server answers and is not paused."""
        try:
            async with asyncio.timeout(min(self._timeout_s, HEALTH_TIMEOUT_S)):
                return (await self._http.get("/health")).status_code == 200
        except (httpx.TransportError, TimeoutError):
            return False

    async def wait_until_healthy(self, timeout_s: float) -> None:
        """Raises ServerUnavailable if `health` is not True within `timeout_s`."""
        try:
            async with asyncio.timeout(timeout_s):
                while not await self.health():
                    await asyncio.sleep(HEALTH_POLL_S)
        except TimeoutError:
            raise ServerUnavailable(
                f"{self._base_url}: not healthy after {timeout_s:g} s; is a server running there, "
                "and not paused?"
            ) from None

    async def model_info(self) -> dict[str, Any]:
        """What the server says of its model, `weight_version` among it."""
        return answer_json(await self._request("GET", "/model_info"))

    async def server_info(self) -> dict[str, Any]:
        """What the server says of itself, `tp_size` among it."""
        return answer_json(await self._request("GET", "/server_info"))

    # ---- control ----

    async def flush_cache(self) -> None:
        """Forget cached prefixes.  RequestRefused while sequences are in flight."""
        await self._post("/flush_cache", {})

    async def abort(self, rid: str | None = None) -> None:
        """End the requests whose id starts with `rid`; None: all."""
        await self._post("/abort_request", {"abort_all": True} if rid is None else {"rid": rid})

    async def release_memory(self) -> None:
        """Give up weights and cache; every request in flight is aborted first, and its end waited
        for, as long as the caller's deadline allows."""
        await self.abort()
        while True:  # with a sequence in flight SGLang refuses to flush, and dies of a release
            try:
                await self.flush_cache()
                break
            except RequestRefused:
                await asyncio.sleep(0.1)
        await self._post("/release_memory_occupation", {"tags": ["kv_cache", "weights"]})

    async def resume_memory(self, tag: Literal["weights", "kv_cache"]) -> None:
        """Take memory again; what was in it is lost, so weights must be handed over."""
        await self._post("/resume_memory_occupation", {"tags": [tag]})

    async def begin_weight_update(self) -> bool:
        """Open an update with tensors.  False: an older server, which needs no such call."""
        return await self._post_if_known("/begin_weight_update")

    async def end_weight_update(self) -> bool:
        """Close an update with tensors.  False: an older server, which needs no such call."""
        return await self._post_if_known("/end_weight_update")

    async def update_weights_from_disk(self, path: str, version: str) -> None:
        """Have the server read a checkpoint folder, which it must see under the same path; nothing
        computed with old weights is used any more."""
        await self._post(
            "/update_weights_from_disk",
            {"model_path": path, "weight_version": version, "flush_cache": True},
        )

    async def update_weights_from_tensor(
        self, parts: Sequence[str], version: str, *, load_format: str | None = None
    ) -> None:
        """Send weights, in any number of parts, between begin_ and end_weight_update.

        Args:
            parts: one for each tensor-parallel rank of the server, with whole tensors under their
                Hugging Face names: by `pack_tensors`, or a bucket's `payload` (weights/handles.py).
            load_format: None for the first kind, handles.FORMAT for the second.
        """
        format_named = {} if load_format is None else {"load_format": load_format}
        await self._post(
            "/update_weights_from_tensor",
            {
                "serialized_named_tensors": list(parts),
                "weight_version": version,
                "flush_cache": True,
                **format_named,
            },
        )

    async def init_weights_update_group(
        self, address: str, port: int, rank: int, world_size: int, name: str, backend: str
    ) -> None:
        """Have the server join a process group at `rank` and, with tensor parallelism, following
        ranks; answers when all `world_size` processes have come."""
        await self._post(
            "/init_weights_update_group",
            {
                "master_address": address,
                "master_port": port,
                "rank_offset": rank,
                "world_size": world_size,
                "group_name": name,
                "backend": backend,
            },
        )

    async def update_weights_from_distributed(
        self, described: Sequence[tuple[str, torch.dtype, Sequence[int]]], version: str, group: str
    ) -> None:
        """Have the server receive tensors, broadcast in this order by rank 0 of a joined group.

        Args:
            described: name, dtype and shape of each tensor.
        """
        await self._post(
            "/update_weights_from_distributed",
            {
                "names": [name for name, _, _ in described],
                "dtypes": [str(dtype).removeprefix("torch.") for _, dtype, _ in described],
                "shapes": [list(shape) for _, _, shape in described],
                "group_name": group,
                "weight_version": version,
                "flush_cache": True,
            },
        )

    async def destroy_weights_update_group(self, name: str) -> None:
        """Have the server leave a group; one that it is not in is no error."""
        try:
            await self._post("/destroy_weights_update_group", {"group_name": name})
        except RequestRefused as refused:
            if refused.status not in (400, 404):
                raise

    # ---- transport ----

    async def _post(self, path: str, body: dict[str, Any]) -> None:
        response = await self._request("POST", path, body)
        is_json = response.headers.get("content-type", "").startswith("application/json")
        content = answer_json(response) if is_json else None
        if isinstance(content, dict) and content.get("success") is False:
            raise RequestRefused(response.status_code, f"{path}: {content.get('message')}")

    async def _post_if_known(self, path: str) -> bool:
        try:
            await self._post(path, {})
        except RequestRefused as refused:
            if refused.status == 404:
                return False
            raise
        return True

    async def _request(
        self, method: str, path: str, body: dict[str, Any] | None = None
    ) -> httpx.Response:
        what = f"{method} {self._base_url}{path}"
        try:
            async with asyncio.timeout(self._timeout_s):
                response = await self._http.request(method, path, json=body)
        except TimeoutError:
            raise ServerUnavailable(f"{what}: no answer within {self._timeout_s:g} s") from None
        except httpx.TransportError as error:
            raise ServerUnavailable(f"{what}: {type(error).__name__}: {error}") from error
        if response.status_code >= 500:
            raise ServerUnavailable(f"{what}: {response.status_code} {error_message(response)}")
        if response.status_code >= 400:
            said = f"{what}: {response.status_code} {error_message(response)}"
            if response.status_code == 401:
                said += "; name the file with its key in rollout.server.api_key_file"
            raise RequestRefused(response.status_code, said)
        return response


def retrying(retries: int) -> AsyncRetrying:
    """Asks again what may have failed for a moment, with growing and jittered pauses.

    >>> async for attempt in retrying(3):
    ...     with attempt:
    ...         return await client.model_info()

    Args:
        retries: further attempts after ServerUnavailable or MalformedAnswer.
    """
    return AsyncRetrying(
        stop=stop_after_attempt(retries + 1),
        wait=_pause_s,
        retry=retry_if_exception_type((ServerUnavailable, MalformedAnswer)),
        reraise=True,
    )


def _pause_s(attempt: RetryCallState) -> float:
    """By another generator than Python's own, whose state the run's checkpoints hold [s]."""
    jitter = random.SystemRandom().uniform(0.0, 0.2)
    return min(0.2 * 2 ** (attempt.attempt_number - 1) + jitter, 10.0)


def pack_tensors(named: Sequence[tuple[str, torch.Tensor]]) -> str:
    """base64 of a plain pickle of [(name, CPU tensor), ...], for engines that share no memory with
    this process: all numbers travel inside the request."""

    def compact(tensor: torch.Tensor) -> torch.Tensor:
        tensor = tensor.detach().cpu().contiguous()
        # A view would be pickled with the whole tensor behind it.
        return tensor if tensor.nbytes == tensor.untyped_storage().nbytes() else tensor.clone()

    content = pickle.dumps([(name, compact(tensor)) for name, tensor in named])
    return base64.b64encode(content).decode("ascii")
