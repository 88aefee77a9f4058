"""How engines are started, or found where others have started them."""

from __future__ import annotations

import asyncio
import dataclasses
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from megatron_gpc.config import Config, ServerConfig, SGLangConfig
from megatron_gpc.config.plain_yaml import read_mapping
from megatron_gpc.config.types import http_url
from megatron_gpc.engines.client import SGLangClient
from megatron_gpc.engines.keys import key_beside, new_key, read_key, write_secret
from megatron_gpc.engines.process import (
    EmbeddedServer,
    ServerProcess,
    SGLangServer,
    server_environment,
)
from megatron_gpc.errors import UserError
from megatron_gpc.run.files import check_regular
from megatron_gpc.run.network import free_port

CHECK_TIMEOUT_S = 60.0
"""How long the interpreter of SGLang's environment may take to say whether SGLang is there [s]."""
URLS_POLL_S = 1.0
"""How often is looked for urls_file [s]."""


class Starter:
    """What the configuration says of engines.

    Args:
        config: rollout.server.
        sglang: how SGLang is started.
        model_path: Hugging Face folder that engines start from.
        log_dir: where started engines log.
        host: this machine's address that they listen on.
    """

    def __init__(
        self,
        config: ServerConfig,
        sglang: SGLangConfig,
        model_path: Path,
        log_dir: Path,
        host: str = "127.0.0.1",
    ):
        self.config, self.sglang = config, sglang
        self.model_path, self.log_dir, self.host = model_path, log_dir, host
        self.python = sglang.python or Path(sys.executable)
        self._own_key: Path | None = None
        self._own_key_lock = threading.Lock()
        self.given_up = threading.Event()
        """Once set, starts that are under way are not waited for."""
        self.tp_size = 1
        """Ranks of one started engine."""
        self.shows_gpus = "CUDA_VISIBLE_DEVICES" not in sglang.environment
        """Whether engines that it starts see the GPUs of this process."""
        if config.kind == "sglang":
            self.tp_size = int(sglang.args.get("tp_size", sglang.args.get("tp", 1)))

    def what_happens(self) -> str:
        """For the user, when engines are about to be started or looked for."""
        config = self.config
        if config.urls_file is not None:
            return f"waiting for rollout engines: {config.urls_file} says where they are"
        if config.urls:
            return f"waiting for rollout engines at {', '.join(config.urls)}"
        engines = "1 rollout engine" if config.engines == 1 else f"{config.engines} rollout engines"
        return f"starting {engines} ({config.kind}), logs in {self.log_dir}"

    def port(self, number: int) -> int:
        """Where engine `number` is to listen."""
        return self.config.port + number if self.config.port else free_port(self.host)

    def engine(self, number: int, port: int) -> ServerProcess:
        """Start engine `number`; returns when it is healthy.

        Raises:
            ServerError: it did not start.
            UserError: api_key_file cannot be read.
        """
        log = self.log_dir / ("server.log" if number == 0 else f"server_{number}.log")
        timeout_s = self.config.start_timeout_s
        if self.config.kind == "embedded":
            return EmbeddedServer(
                self.model_path,
                log,
                host=self.host,
                port=port,
                api_key_file=self.key_file(),
                start_timeout_s=timeout_s,
                given_up=self.given_up,
            )
        args = dict(self.sglang.args)
        args["config"] = self._secrets()
        if self.config.colocated:
            args["enable_memory_saver"] = True
        several = "base_gpu_id" in args or self.config.engines > 1
        if several and args.get("device") != "cpu":  # engines share the host's GPUs
            args["base_gpu_id"] = args.get("base_gpu_id", 0) + number * self.tp_size
        return SGLangServer(
            "sglang.launch_server",
            self.python,
            {"model_path": self.model_path, "host": self.host, "port": port, **args},
            self.sglang.environment,
            log,
            timeout_s,
            given_up=self.given_up,
        )

    def router(self, urls: Sequence[str]) -> SGLangServer:
        """Start sglang-router in front of engines.

        Raises:
            ServerError: it did not start.
        """
        return SGLangServer(
            "sglang_router.launch_router",
            self.python,
            {"worker_urls": urls},
            self.sglang.environment,
            self.log_dir / "router.log",
            self.config.start_timeout_s,
            health="/readiness",  # /health is well before it knows an engine
            given_up=self.given_up,
        )

    def client(self, url: str, router: bool = False) -> SGLangClient:
        """For an engine or a router.

        Raises:
            UserError: api_key_file cannot be read.
        """
        return SGLangClient(
            url,
            timeout_s=self.config.request_timeout_s,
            max_in_flight=self.config.max_in_flight,
            api_key=self._api_key(),
            batched=not router,
        )

    def key_file(self) -> Path | None:
        """With the key that engines ask for: the configured one, that of `serve` beside its list of
        addresses, or a new one for engines that are started for this run alone.

        Raises:
            UserError: it cannot be written.
        """
        config = self.config
        if config.api_key_file is not None or config.urls:
            return config.api_key_file
        if config.urls_file is not None:
            beside = key_beside(config.urls_file)
            return beside if beside.exists() else None
        with self._own_key_lock:  # engines start side by side
            self._own_key = self._own_key or new_key(self.log_dir / "api_key")
        return self._own_key

    def _api_key(self) -> str | None:
        file = self.key_file()
        return None if file is None else read_key(file)

    def _secrets(self) -> Path:
        """Arguments of SGLang that no process list may show, in a file only the user can read; and
        those of a file that the user gives it.

        Raises:
            UserError: the user's file cannot be read.
        """
        given: Any = {}
        if own := self.sglang.args.get("config"):
            try:
                given = read_mapping(Path(own))
            except UserError as error:
                raise UserError(f"sglang.args.config: {error}") from None
        text = yaml.safe_dump({**given, "api-key": self._api_key()})
        return write_secret(self.log_dir / "sglang_secrets.yaml", text)

    async def running_urls(self) -> Sequence[str]:
        """Engines that others have started, or will have; empty if they are started here.

        Raises:
            UserError: urls_file did not appear in time, or is no list of addresses.
        """
        file = self.config.urls_file
        if file is None:
            return self.config.urls
        deadline = time.monotonic() + self.config.start_timeout_s
        while not file.exists():
            if time.monotonic() > deadline:
                raise UserError(
                    f"rollout.server.urls_file: {file} did not appear within "
                    f"{self.config.start_timeout_s:g} s"
                )
            await asyncio.sleep(URLS_POLL_S)
        return _urls(file)


def sglang_of(config: Config) -> SGLangConfig:
    """The section `sglang`, with what else the run needs of engines that are started."""
    if not config.train.routing_replay:
        return config.sglang
    args = {**config.sglang.args, "enable_return_routed_experts": True}
    return dataclasses.replace(config.sglang, args=args)


def check_start(config: ServerConfig, sglang: SGLangConfig, host: str = "127.0.0.1") -> None:
    """Refuse, before anything is started, what would keep engines from starting or answering.

    Args:
        config: rollout.server.
        host: this machine's address that they are to listen on.

    Raises:
        UserError: a key file that has no key or that others can read, urls_file has no addresses, a
            port is in use, or SGLang is not installed where sglang.python says.
    """
    if config.api_key_file is not None:
        read_key(config.api_key_file)
    if config.urls_file is not None and config.urls_file.exists():
        _urls(config.urls_file)
    if not (config.urls or config.urls_file):
        for port in range(config.port, config.port + config.engines) if config.port else ():
            _check_port(host, port)
        if config.kind == "sglang":
            _check_module("sglang", sglang)
    if config.router:
        _check_module("sglang_router", sglang)


def _check_port(host: str, port: int) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as servers do
        try:
            probe.bind((host, port))
        except OSError as error:
            raise UserError(
                f"rollout.server.port: nothing can listen on {host}:{port} ({error.strerror}); "
                "end what has the port, name another, or 0 for any that is free"
            ) from None


def _check_module(name: str, sglang: SGLangConfig) -> None:
    """Whether a Python package can be found where SGLang is to run."""
    python = sglang.python or Path(sys.executable)
    advice = (
        "set sglang.python to the interpreter of an environment with SGLang, or take "
        "rollout.server.kind=embedded"
    )
    find = f"import importlib.util; print(importlib.util.find_spec({name!r}) is not None)"
    try:
        done = subprocess.run(
            [str(python), "-P", "-c", find],
            env=server_environment(sglang.environment),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=CHECK_TIMEOUT_S,
        )
    except subprocess.TimeoutExpired:
        raise UserError(
            f"sglang.python: {python} did not answer within {CHECK_TIMEOUT_S:g} s; {advice}"
        ) from None
    except OSError as error:
        raise UserError(
            f"sglang.python: {python} cannot be run: {error.strerror}; {advice}"
        ) from None
    if done.returncode or done.stdout.strip() not in (b"True", b"False"):
        raise UserError(f"sglang.python: {python} is no Python that runs; {advice}")
    if done.stdout.strip() == b"False":
        raise UserError(f"sglang.python: {python} has no package {name}; {advice}")


def _urls(file: Path) -> list[str]:
    """The addresses in rollout.server.urls_file."""
    what = f"rollout.server.urls_file: {file}: expected one address a line"
    try:
        check_regular(file)
        urls = [http_url(url) for url in file.read_text().split()]
    except (OSError, ValueError) as error:
        raise UserError(f"{what}: {error}") from None
    if not urls:
        raise UserError(f"{what}, such as http://10.0.0.7:30000")
    return urls
