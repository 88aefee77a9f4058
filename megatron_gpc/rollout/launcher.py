"""Starts the embedded server as a process of its own and sees to it that it ends."""

from __future__ import annotations

import os
import select
import subprocess
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import Self

from megatron_gpc.launch import own_search_path
from megatron_gpc.rollout.client import RolloutError

STOP_TIMEOUT_S = 5.0
"""How long the server may take to end by itself before it is killed."""
LOG_LINES = 20


class EmbeddedServer:
    """An embedded server for the time of a `with` block.

    It listens on a free port of 127.0.0.1.  It also ends when the thread that started it ends, in
    whatever way (the kernel sees to that), so start it from a thread that lives long enough.

    Args:
        model_path: Hugging Face checkpoint folder, tokenizer included.
        log_file: file that the server's output is appended to.
        start_timeout_s: how long it may take until it answers [s].
        dtype: of weights and activations; "auto" takes the checkpoint's.
        threads: CPU threads of the engine.
        max_running: sequences decoded at the same time.

    Raises:
        RolloutError: it ended while starting or was not up in time; with the end of its log.
    """

    def __init__(self, model_path: Path, log_file: Path, *, start_timeout_s: float = 180.0,
                 dtype: str = "auto", threads: int = 1, max_running: int = 256):
        self._log = Path(log_file)
        self._log.parent.mkdir(parents=True, exist_ok=True)
        receiver, sender = os.pipe()
        command = [
            sys.executable, "-P", "-m", "megatron_gpc.rollout.server",
            "--model-path", str(model_path),
            "--host", "127.0.0.1", "--port", "0", "--port-fd", str(sender),
            "--parent", str(os.getpid()), "--dtype", dtype, "--threads", str(threads),
            "--max-running-requests", str(max_running)]
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads),
                       "PYTHONPATH": own_search_path(),
                       "PYTHONUNBUFFERED": "1", "HF_HUB_OFFLINE": "1"}
        try:
            with self._log.open("ab") as output:
                self._process = subprocess.Popen(
                    command, env=environment, stdin=subprocess.DEVNULL, stdout=output,
                    stderr=subprocess.STDOUT, pass_fds=[sender])
        finally:
            os.close(sender)  # or the end of the server would never show as the end of the pipe
        try:
            self.url = f"http://127.0.0.1:{self._await_port(receiver, start_timeout_s)}"
        except BaseException:
            self.stop()
            raise
        finally:
            os.close(receiver)

    def _await_port(self, receiver: int, timeout_s: float) -> int:
        """The port, which the server sends once it listens; an ended server closes the pipe."""
        deadline = time.monotonic() + timeout_s
        sent = b""
        while not sent.endswith(b"\n"):
            left = max(deadline - time.monotonic(), 0.0)
            if not select.select([receiver], [], [], left)[0]:
                raise RolloutError(f"the embedded server was not up after {timeout_s:g} s; "
                                   f"{self._end_of_log()}")
            piece = os.read(receiver, 16)
            if not piece:
                self.stop()
                raise RolloutError("the embedded server ended while starting (exit code "
                                   f"{self._process.returncode}); {self._end_of_log()}")
            sent += piece
        return int(sent)

    def _end_of_log(self) -> str:
        lines = self._log.read_text(errors="replace").splitlines()[-LOG_LINES:]
        return f"last lines of {self._log}:\n" + "\n".join(lines)

    @property
    def pid(self) -> int:
        return self._process.pid

    def alive(self) -> bool:
        return self._process.poll() is None

    def stop(self) -> None:
        """End the server; killed where it does not end in time.  Does nothing the second time."""
        if self.alive():
            self._process.terminate()
        try:
            self._process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait(STOP_TIMEOUT_S)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        self.stop()
