"""How engines are started, or found where others have started them."""

from __future__ import annotations

import asyncio
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import yaml

from megatron_gpc.config import ServerConfig, SGLangConfig
from megatron_gpc.engines.client import SGLangClient
from megatron_gpc.engines.process import EmbeddedServer, ServerProcess, SGLangServer
from megatron_gpc.errors import UserError
from megatron_gpc.run.launch import free_port

LOOK_S = 1.0
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
        self.given_up = threading.Event()
        """Once set, starts that are under way are not waited for."""
        self.tp_size = 1
        """Ranks of one started engine."""
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
                api_key_file=self.config.api_key_file,
                start_timeout_s=timeout_s,
                given_up=self.given_up,
            )
        args = dict(self.sglang.args)
        if self.config.api_key_file is not None:
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
            retries=self.config.retries,
            max_in_flight=self.config.max_in_flight,
            api_key=self._api_key(),
            batched=not router,
        )

    def _api_key(self) -> str | None:
        file = self.config.api_key_file
        return None if file is None else _read(file, "api_key_file").strip()

    def _secrets(self) -> Path:
        """Arguments of SGLang that no process list may show, in a file only the user can read."""
        file = self.log_dir / "sglang_secrets.yaml"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch(mode=0o600)
        file.write_text(yaml.safe_dump({"api-key": self._api_key()}))
        return file

    async def running_urls(self) -> Sequence[str]:
        """Engines that others have started, or will have; empty where they are started here.

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
            await asyncio.sleep(LOOK_S)
        urls = _read(file, "urls_file").split()
        if not urls or not all(url.startswith(("http://", "https://")) for url in urls):
            raise UserError(
                f"rollout.server.urls_file: {file}: expected one address a line, such as "
                "http://10.0.0.7:30000"
            )
        return urls


def _read(file: Path, key: str) -> str:
    try:
        return file.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"rollout.server.{key}: {file}: cannot be read: {error}") from None
