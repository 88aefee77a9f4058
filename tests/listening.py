"""The embedded server's application on a real port, in this process."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import uvicorn

from megatron_gpc.server.gate import BoundedProtocol, Gate


@contextmanager
def listening(app: Gate) -> Iterator[int]:
    """On a port of 127.0.0.1, as `python -m megatron_gpc.server` runs it."""
    settings = {"http": BoundedProtocol, "ws": "none", "log_level": "error", "lifespan": "off"}
    running = uvicorn.Server(uvicorn.Config(app, **settings))
    listener = socket.create_server(("127.0.0.1", 0), backlog=1024)
    thread = threading.Thread(target=running.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    try:
        yield listener.getsockname()[1]
    finally:
        running.should_exit = True
        thread.join(10)
