"""An inference server with SGLang's HTTP interface, around the embedded generator.

    python -m megatron_gpc.server --model-path MODEL --port 30000

It answers in the shapes of SGLang 0.5.2x, so that a client cannot tell the two apart, and exists
because SGLang needs a GPU and gigabytes.  What it lacks, it refuses by name.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import signal
import socket
import sys
import time
import uuid
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

import uvicorn
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse, Response
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

import megatron_gpc
from megatron_gpc.engines.keys import read_key
from megatron_gpc.errors import UserError
from megatron_gpc.rollout.tokenizer import decoder, eos_tokens, load_tokenizer
from megatron_gpc.run.child import die_with
from megatron_gpc.server import loading, sequence
from megatron_gpc.server.gate import BoundedProtocol, Gate, room_for_connections
from megatron_gpc.server.generate import MOST_CHARACTERS, answer, parse
from megatron_gpc.server.generator import MEMORY, Generator, GeneratorEnded
from megatron_gpc.server.protocol import (
    AbortBody,
    DiskBody,
    DistributedBody,
    GenerateBody,
    GroupBody,
    GroupNameBody,
    MemoryBody,
    PauseBody,
    TensorBody,
    VersionBody,
)
from megatron_gpc.server.sampling import SamplingParams
from megatron_gpc.server.sequence import RequestFailed
from megatron_gpc.server.weight_receiver import WeightReceiver
from megatron_gpc.weights import handles

T = TypeVar("T")
MOST_BYTES = 32 * 2**20
"""Of a body, for a model of no size."""
MOST_SAID = 500
"""Characters of a refusal."""
COMMAND_TIMEOUT_S = 600.0
"""How long a pause, a weight update and the like may take; a large checkpoint takes longest."""
PROBE_TIMEOUT_S = 20.0
OF_WEIGHTS: dict[str, dict[str, Any]] = {
    "/update_weights_from_disk": {"num_paused_requests": 0},
    "/update_weights_from_tensor": {},
    "/update_weights_from_distributed": {},
    "/init_weights_update_group": {},
    "/destroy_weights_update_group": {},
}
"""Paths that say whether it went well in the body, and what else stands there."""
FLUSHED = (
    "Cache flushed.\nPlease check backend logs for more details. (When there are running "
    "or waiting requests, the operation will not be performed.)\n"
)


class Server:
    """The routes and what they share: one generator and its tokenizer."""

    def __init__(self, generator: Generator, tokenizer: PreTrainedTokenizerBase, model_path: str):
        self.generator = generator
        self.tokenizer = tokenizer
        self.model_path = model_path
        self.in_update = False
        self.receiver = WeightReceiver(most_elements=2 * generator.num_parameters)
        self._probes: dict[str, Future] = {}
        self._texts = ThreadPoolExecutor(1, "texts")
        """Where texts become tokens and tokens texts, so that /health need not wait for it."""

    # ---- generation ----

    async def generate(self, body: GenerateBody, http: Request) -> Response:
        started = time.perf_counter()
        if body.stream:
            raise UserError("The embedded server does not stream; leave stream out.")
        loop = asyncio.get_running_loop()
        most = MOST_CHARACTERS * self.generator.context_length
        requests, wants_logprob, single = await loop.run_in_executor(
            self._texts, parse, body, self.tokenizer, most
        )
        future = asyncio.wrap_future(self.generator.submit(requests))
        while not (await asyncio.wait({future}, timeout=1.0))[0]:
            if await http.is_disconnected():  # a client that gave up must not keep the batch busy
                await self._command(self.generator.drop(requests))
        results, loads = future.result(), self.generator.weight_loads
        wanted = [
            (request.rid if request.params.n == 1 else uuid.uuid4().hex, logprob)
            for request, logprob in zip(requests, wants_logprob, strict=True)
            for _ in range(request.params.n)
        ]
        seconds = time.perf_counter() - started
        answers = await loop.run_in_executor(
            self._texts,
            lambda: [
                answer(result, rid, logprob, loads, seconds, self.tokenizer)
                for result, (rid, logprob) in zip(results, wanted, strict=True)
            ],
        )
        return JSONResponse(answers[0] if single and len(answers) == 1 else answers)

    # ---- state ----

    async def health(self) -> Response:
        return await self._healthy("load", self.generator.load)

    async def health_generate(self) -> Response:
        params = SamplingParams(max_new_tokens=1, temperature=0.0)
        probe = sequence.Request("HEALTH_CHECK_" + uuid.uuid4().hex, (0,), params)
        return await self._healthy("generate", lambda: self.generator.submit([probe]))

    async def _healthy(self, kind: str, work: Callable[[], Future]) -> Response:
        """200 if the generator does some work in time.  All who ask meanwhile wait for the same:
        nobody needs a key to ask."""
        if self.generator.paused:
            return Response(status_code=503)
        if kind not in self._probes or self._probes[kind].done():
            self._probes[kind] = work()
        probe = asyncio.shield(asyncio.wrap_future(self._probes[kind]))
        try:
            await asyncio.wait_for(probe, PROBE_TIMEOUT_S)
        except (GeneratorEnded, RequestFailed, FloatingPointError, TimeoutError):
            return Response(status_code=503)
        return Response()

    async def ping(self) -> Response:
        return Response()

    async def model_info(self) -> Response:
        config = self.generator.config
        return JSONResponse(
            {
                "model_path": self.model_path,
                "served_model_name": self.model_path,
                "tokenizer_path": self.model_path,
                "is_generation": True,
                "preferred_sampling_params": None,
                "weight_version": self.generator.weight_version,
                "weight_loads": self.generator.weight_loads,
                "load_format": "auto",
                "has_image_understanding": False,
                "has_audio_understanding": False,
                "model_type": config.model_type,
                "architectures": config.architectures,
            }
        )

    async def server_info(self) -> Response:
        running, waiting = await self._command(self.generator.load())
        return JSONResponse(
            {
                "model_path": self.model_path,
                "tokenizer_path": self.model_path,
                "context_length": self.generator.context_length,
                "dtype": self.generator.dtype,
                "device": "cpu",
                "tp_size": 1,
                "pp_size": 1,
                "dp_size": 1,
                "max_running_requests": self.generator.max_running,
                "enable_return_routed_experts": self.generator.routes_tokens,
                "weight_version": self.generator.weight_version,
                "status": "ready",
                "internal_states": [
                    {
                        "paused": self.generator.paused,
                        "num_running_reqs": running,
                        "num_waiting_reqs": waiting,
                    }
                ],
                "version": f"megatron-gpc-{megatron_gpc.__version__}",
            }
        )

    # ---- control ----

    async def flush_cache(self) -> Response:
        if await self._command(self.generator.flush_cache()):
            return PlainTextResponse(FLUSHED)
        return PlainTextResponse("Flush cache failed.\n", status_code=400)

    async def pause(self, body: PauseBody) -> Response:
        await self._command(self.generator.pause(body.mode))
        return JSONResponse({"message": "Generation paused successfully.", "status": "ok"})

    async def resume(self) -> Response:
        await self._command(self.generator.resume())
        return JSONResponse({"message": "Generation continued successfully.", "status": "ok"})

    async def abort(self, body: AbortBody) -> Response:
        if not body.rid and not body.abort_all:
            raise UserError("Either rid or abort_all should be provided.")
        await self._command(self.generator.abort(None if body.abort_all else body.rid))
        return Response()

    async def update_from_disk(self, body: DiskBody) -> Response:
        if body.abort_all_requests:
            await self._command(self.generator.abort(None))
        folder, version = Path(body.model_path), body.weight_version
        await self._command(self.generator.update_from_folder(folder, version))
        return _updated("Succeeded to update model weights.", version, num_paused_requests=0)

    async def update_from_tensor(self, body: TensorBody) -> Response:
        self._check_in_update("update_weights_from_tensor")
        if body.load_format not in (None, handles.FORMAT):
            raise UserError(
                f"The embedded server has no load_format={body.load_format!r}; send a "
                f"pickled list of (name, tensor), or a {handles.FORMAT}"
            )
        if not body.serialized_named_tensors:
            raise UserError("serialized_named_tensors must have one entry")
        read = loading.unpack_tensors if body.load_format is None else handles.unpack
        named = await asyncio.to_thread(read, body.serialized_named_tensors[0])
        await self._command(self.generator.update_from_tensors(named, body.weight_version))
        return _updated("Success", body.weight_version)

    async def update_from_distributed(self, body: DistributedBody) -> Response:
        self._check_in_update("update_weights_from_distributed")
        described = body.names, body.dtypes, body.shapes
        named = await self._in_group(self.receiver.receive, body.group_name, *described)
        await self._command(self.generator.update_from_tensors(named, body.weight_version))
        return _updated("Succeeded to update parameter online.", body.weight_version)

    def _check_in_update(self, path: str) -> None:
        if not self.in_update:
            raise UserError(
                f"{path} must run between begin_weight_update() and end_weight_update()"
            )

    async def begin_update(self) -> Response:
        self.in_update = True
        return _updated("Success")

    async def end_update(self) -> Response:
        self.in_update = False
        return _updated("Success")

    async def join_group(self, body: GroupBody) -> Response:
        await self._in_group(
            self.receiver.join,
            *(body.master_address, body.master_port, body.rank_offset, body.world_size),
            *(body.group_name, body.backend),
        )
        return _updated("Succeeded to initialize custom process group.")

    async def leave_group(self, body: GroupNameBody) -> Response:
        await self._in_group(self.receiver.leave, body.group_name)
        return _updated("Succeeded to destroy custom process group.")

    async def _in_group(self, work: Callable[..., T], *arguments: Any) -> T:
        """What waits for other processes, in a thread of the groups'."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self.receiver.threads, work, *arguments)

    async def release(self, body: MemoryBody) -> Response:
        return await self._of_memory(self.generator.release, body, "released")

    async def restore(self, body: MemoryBody) -> Response:
        return await self._of_memory(self.generator.restore, body, "resumed")

    async def _of_memory(
        self, work: Callable[[set[str]], Future], body: MemoryBody, done: str
    ) -> Response:
        tags = MEMORY if body.tags is None else set(body.tags)
        if not tags or tags - MEMORY:
            raise UserError(f"tags must name {' or '.join(sorted(MEMORY))}; leave it out for both.")
        await self._command(work(tags))
        print(done, *sorted(tags), flush=True)
        return JSONResponse(None)

    async def update_version(self, body: VersionBody) -> Response:
        if body.abort_all_requests:
            await self._command(self.generator.abort(None))
        await self._command(self.generator.set_version(body.new_version))
        return JSONResponse(
            {
                "success": True,
                "new_version": body.new_version,
                "message": f"Weight version updated to {body.new_version}",
            }
        )

    async def _command(self, future: Future) -> Any:
        return await asyncio.wait_for(asyncio.wrap_future(future), COMMAND_TIMEOUT_S)

    # ---- app ----

    def app(self, api_key: str | None = None) -> Gate:
        """The application.  If there is a key, requests must carry it as a bearer token."""
        app = FastAPI(lifespan=self._lifespan, openapi_url=None, redirect_slashes=False)
        for path, handler in {
            "/health": self.health,
            "/health_generate": self.health_generate,
            "/ping": self.ping,
            "/model_info": self.model_info,
            "/get_model_info": self.model_info,
            "/server_info": self.server_info,
            "/flush_cache": self.flush_cache,
        }.items():
            app.get(path)(handler)
        for path, handler in {
            "/generate": self.generate,
            "/flush_cache": self.flush_cache,
            "/pause_generation": self.pause,
            "/continue_generation": self.resume,
            "/abort_request": self.abort,
            "/update_weights_from_disk": self.update_from_disk,
            "/update_weights_from_tensor": self.update_from_tensor,
            "/init_weights_update_group": self.join_group,
            "/update_weights_from_distributed": self.update_from_distributed,
            "/destroy_weights_update_group": self.leave_group,
            "/release_memory_occupation": self.release,
            "/resume_memory_occupation": self.restore,
            "/begin_weight_update": self.begin_update,
            "/end_weight_update": self.end_update,
            "/update_weight_version": self.update_version,
        }.items():
            app.post(path)(handler)
        app.exception_handler(UserError)(_refused_as)
        app.exception_handler(RequestValidationError)(
            lambda http, error: _refused(_first_problem(error), 400)
        )
        for failure in (GeneratorEnded, RequestFailed, FloatingPointError):
            app.exception_handler(failure)(lambda http, error: _refused(str(error), 500))
        return Gate(app, api_key, self._most_bytes)

    def _most_bytes(self, path: str) -> int:
        """Of a body: as many full prompts as run at a time, or twice the weights in fp32."""
        generator = self.generator
        if path == "/update_weights_from_tensor":
            return MOST_BYTES + 12 * generator.num_parameters  # base64 has 4 bytes for 3
        return MOST_BYTES + 8 * generator.max_running * generator.context_length

    @asynccontextmanager
    async def _lifespan(self, app: FastAPI) -> AsyncIterator[None]:
        yield
        self.generator.close()


def _refused(message: str, status: int) -> Response:
    return JSONResponse({"error": {"message": _line(message)}}, status_code=status)


def _refused_as(http: Request, error: Exception) -> Response:
    """What the user has got wrong, in the shape that SGLang has for this path."""
    if (more := OF_WEIGHTS.get(http.url.path)) is None:
        return _refused(str(error), 400)
    return JSONResponse({"success": False, "message": _line(str(error)), **more}, status_code=400)


def _updated(message: str, version: str | None = None, **more: Any) -> Response:
    if version is not None:
        message += f" Weight version updated to {version}."
    return JSONResponse({"success": True, "message": message, **more})


def _line(message: str) -> str:
    """One that can be sent, whatever names a request has put into it."""
    text = " ".join(message.encode(errors="backslashreplace").decode().split())
    half = MOST_SAID // 2
    return text if len(text) <= MOST_SAID else f"{text[:half]} ... {text[-half:]}"


def _first_problem(error: RequestValidationError) -> str:
    problem = error.errors()[0]
    return f"{'.'.join(str(part) for part in problem['loc'][1:])}: {problem['msg']}"


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens there, at port 0 at any free one; its connections send at once.

    Without TCP_NODELAY an answer's body waits 40 ms until its headers are acknowledged.  asyncio
    sets it only on sockets that name their protocol, which create_server's do not.

    Raises:
        OSError, OverflowError: it cannot.
    """
    listener = socket.create_server((host, port), backlog=1024)
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return listener


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="megatron_gpc.server",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model-path", type=Path, required=True, help="Hugging Face folder")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=30000, help="0: any free one")
    parser.add_argument("--dtype", default="auto", help="such as float32; auto: the checkpoint's")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of the generator")
    parser.add_argument("--max-running-requests", type=int, default=256)
    parser.add_argument("--api-key-file", type=Path, help="with the key that requests must carry")
    parser.add_argument("--port-fd", type=int, help="write the port to this file descriptor")
    parser.add_argument("--parent", type=int, help="end when this parent process ends")
    args = parser.parse_args()
    if args.parent is not None:
        die_with(args.parent)
    transformers_logging.set_verbosity_error()
    if not args.model_path.is_dir():
        sys.exit(f"--model-path: {args.model_path} is not a folder")
    try:
        api_key = read_key(args.api_key_file, "--api-key-file") if args.api_key_file else None
    except UserError as error:
        sys.exit(str(error))
    try:
        tokenizer = load_tokenizer(args.model_path)
        generator = Generator(
            args.model_path,
            dtype=args.dtype,
            threads=args.threads,
            max_running=args.max_running_requests,
            end_tokens=eos_tokens(tokenizer),
            decode=decoder(tokenizer),
        )
    except (UserError, OSError) as error:
        sys.exit(f"--model-path: {error}")
    try:
        listener = listen(args.host, args.port)
    except (OSError, OverflowError) as error:
        sys.exit(f"--host, --port: cannot listen on {args.host}:{args.port}: {error}")
    port = listener.getsockname()[1]
    if args.port_fd is not None:
        os.write(args.port_fd, f"{port}\n".encode())
        os.close(args.port_fd)
    app = Server(generator, tokenizer, str(args.model_path)).app(api_key)
    BoundedProtocol.most = room_for_connections()
    settings: dict[str, Any] = {"http": BoundedProtocol, "ws": "none", "log_level": "warning"}
    server = uvicorn.Server(uvicorn.Config(app, timeout_graceful_shutdown=2, **settings))
    signal.signal(signal.SIGHUP, server.handle_exit)  # uvicorn's own two end it too, if they come
    with suppress(KeyboardInterrupt):  # which uvicorn raises once it has ended
        server.run(sockets=[listener])
