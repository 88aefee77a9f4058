"""Starts rollout servers as processes of their own and sees to it that they end."""

from __future__ import annotations

import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, Self

import httpx

from megatron_gpc.engines.answers import RolloutError
from megatron_gpc.run.child import Child, die_with, own_search_path
from megatron_gpc.run.launch import STACKS_SIGNAL
from megatron_gpc.run.network import free_port

STOP_TIMEOUT_S = 5.0
"""How long a server may take to end by itself before it is killed."""
START_POLL_S = 0.2
"""How often a server that starts is looked at [s]."""


class ServerError(RolloutError):
    """A server did not start; the message has the end of its log."""


def _before_it_runs(deaf_to: Collection[int], parent: int) -> None:
    """Run in the new process before its program."""
    die_with(parent)
    signal.pthread_sigmask(signal.SIG_BLOCK, deaf_to)
    for one in (signal.SIGUSR1, STACKS_SIGNAL):  # Slurm sends them to every process of a step
        signal.signal(one, signal.SIG_IGN)


class ServerProcess(Child):
    """A server for the time of a `with` block.

    Args:
        name: for messages.
        command: what to run.
        environment: all of its environment.
        log: file that its output is appended to.
        pass_fds: file descriptors that it inherits.
        given_up: once set, a start is not waited for any longer.
    """

    url: str
    end_signal = signal.SIGTERM
    """What asks it to end."""
    deaf_to = (signal.SIGINT,)
    """Kept from it for good: Ctrl-C is for whoever started it, and srun sends it to all."""

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        environment: Mapping[str, str],
        log: Path,
        pass_fds: Sequence[int] = (),
        given_up: threading.Event | None = None,
    ):
        self.name = name
        self._given_up = given_up or threading.Event()
        log.parent.mkdir(parents=True, exist_ok=True)
        begin = partial(_before_it_runs, self.deaf_to)
        super().__init__(command, environment, log, session=True, begin=begin, pass_fds=pass_fds)

    def failure(self, what: str) -> ServerError:
        """An error about this server that ends with what it logged last."""
        return ServerError(f"{self.name} {what}; last lines of {self.log}:\n{self.last_words()}")

    def await_up(self, looks_up: Callable[[], bool], timeout_s: float) -> None:
        """Look until it is up; if that fails it is ended.

        Args:
            looks_up: waits a little by itself if it is not.

        Raises:
            ServerError: it ended, was not up in time, or nobody waits for it any longer.
        """
        deadline = time.monotonic() + timeout_s
        try:
            while True:
                if self._given_up.is_set():
                    self.process.kill()  # it has nothing to finish, and may not hear signals yet
                    raise ServerError(f"{self.name}: nobody waits for it any longer")
                if looks_up():
                    return
                if not self.alive():
                    code = self.process.returncode
                    raise self.failure(f"ended while starting (exit code {code})")
                if time.monotonic() > deadline:
                    raise self.failure(f"was not up after {timeout_s:g} s")
        except BaseException:
            self.stop()
            raise

    @property
    def pid(self) -> int:
        return self.process.pid

    def stop(self) -> None:
        """End the server; killed if it does not end in time.  Does nothing the second time."""
        self.end(self.end_signal, STOP_TIMEOUT_S)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()


class EmbeddedServer(ServerProcess):
    """The project's own server.

    Args:
        model_path: Hugging Face checkpoint folder, tokenizer included.
        log_file: file that the server's output is appended to.
        host: address that it listens on.
        port: 0 takes any that is free.
        api_key_file: file with the key that it asks for.
        start_timeout_s: how long it may take until it answers [s].
        given_up: see `ServerProcess`.

    Raises:
        ServerError: it ended while starting or was not up in time; with the end of its log.
    """

    # Slurm sends SIGTERM to every process of a job that is to end.  The trainer then saves, and
    # needs samples to come to the end of its step; afterwards it ends this server.
    deaf_to = (signal.SIGINT, signal.SIGTERM)
    end_signal = signal.SIGHUP

    def __init__(
        self,
        model_path: Path,
        log_file: Path,
        *,
        host: str = "127.0.0.1",
        port: int = 0,
        api_key_file: Path | None = None,
        start_timeout_s: float = 180.0,
        given_up: threading.Event | None = None,
    ):
        receiver, sender = os.pipe()
        try:
            super().__init__(
                "the embedded server",
                [
                    *(sys.executable, "-P", "-m", "megatron_gpc.server"),
                    *("--model-path", str(model_path), "--parent", str(os.getpid())),
                    *("--host", host, "--port", str(port), "--port-fd", str(sender)),
                    *(("--api-key-file", str(api_key_file)) if api_key_file else ()),
                ],
                {
                    **os.environ,
                    "OMP_NUM_THREADS": "1",
                    "PYTHONPATH": own_search_path(),
                    "PYTHONUNBUFFERED": "1",
                    "HF_HUB_OFFLINE": "1",
                },
                log_file,
                pass_fds=[sender],
                given_up=given_up,
            )
        finally:
            os.close(sender)  # or the end of the server would never show as the end of the pipe
        said = bytearray()

        def says_its_port() -> bool:  # once it listens; an ended server closes the pipe
            if select.select([receiver], [], [], min(START_POLL_S, start_timeout_s))[0]:
                said.extend(os.read(receiver, 16))
            return said.endswith(b"\n")

        try:
            self.await_up(says_its_port, start_timeout_s)
        finally:
            os.close(receiver)
        self.url = f"http://{host}:{int(said)}"


class SGLangServer(ServerProcess):
    """SGLang, or its router, in an environment of its own; on 127.0.0.1, if no host is given.

    Its own processes end with it: SGLang asks the kernel for that, as we do.

    Args:
        module: `sglang.launch_server` or `sglang_router.launch_router`.
        python: interpreter of the environment that it is installed in.
        args: arguments by name; True is a bare flag, False and None leave it out, a list repeats;
            without a `port` among them any that is free is taken.
        environment: in addition to this process's.
        log_file: file that the server's output is appended to.
        start_timeout_s: how long it may take until it is healthy [s].
        health: where it says whether it is.
        given_up: see `ServerProcess`.

    Raises:
        ServerError: it ended while starting or was not healthy in time; with the end of its log.
    """

    def __init__(
        self,
        module: str,
        python: Path,
        args: Mapping[str, Any],
        environment: Mapping[str, str],
        log_file: Path,
        start_timeout_s: float,
        health: str = "/health",
        given_up: threading.Event | None = None,
    ):
        given = {"host": "127.0.0.1", **args}
        given["port"] = given.get("port") or free_port(given["host"])
        self.url = f"http://{given['host']}:{given['port']}"
        super().__init__(
            module.partition(".")[0],
            [str(python), "-P", "-m", module, *command_line_arguments(given)],
            server_environment(environment),
            log_file,
            given_up=given_up,
        )

        def is_healthy() -> bool:
            with suppress(httpx.TransportError):
                if http.get(health).status_code == 200:
                    return True
            time.sleep(START_POLL_S)
            return False

        with httpx.Client(base_url=self.url, trust_env=False, timeout=30.0) as http:
            self.await_up(is_healthy, start_timeout_s)


def command_line_arguments(args: Mapping[str, Any]) -> list[str]:
    """{tp_size: 2, trust_remote_code: True} -> --tp-size 2 --trust-remote-code."""
    made: list[str] = []
    for name, value in args.items():
        if value is None or value is False:
            continue
        made.append("--" + name.replace("_", "-"))
        if value is not True:
            made += map(str, value if isinstance(value, list | tuple) else [value])
    return made


def server_environment(given: Mapping[str, str]) -> dict[str, str]:
    """Of SGLang: ours and what is given, without what would make it believe that it is one of our
    ranks, and without what a rank sets for its own use of a GPU: SGLang has values of its own, and
    its memory cannot be released with expandable segments."""
    ours = {
        *("CUDA_DEVICE_MAX_CONNECTIONS", "PYTORCH_CUDA_ALLOC_CONF"),
        *("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"),
        *("OMP_NUM_THREADS", "PYTHONPATH", "TORCHELASTIC_ERROR_FILE"),
    }
    kept = {name: value for name, value in os.environ.items() if name not in ours}
    return {"HF_HUB_OFFLINE": "1", **kept, **given}
