"""A TCP proxy that can be cut: it stands between the trainer and an engine."""

from __future__ import annotations

import asyncio
import socket
import threading
from contextlib import suppress
from typing import Literal, Self

Cut = Literal["refused", "reset", "silent", "halved"]
"""Connections are refused; they are reset, new ones too; nothing passes; an answer ends after a few
bytes, and every one after it."""
BYTES = 65536
HALF = 40
"""What still passes of an answer that is cut [bytes]."""


class Proxy:
    """Listens on a free port of 127.0.0.1 for the time of a `with` block.

    Args:
        port: where it connects to, on 127.0.0.1.
    """

    def __init__(self, port: int):
        self._to = port
        self._cut: Cut | None = None
        self._open = asyncio.Event()
        self._writers: set[asyncio.StreamWriter] = set()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="proxy", daemon=True)
        self.port = 0

    def __enter__(self) -> Self:
        self._thread.start()
        self._do(self._listen())
        return self

    def __exit__(self, *_: object) -> None:
        self._do(self._end())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)

    def cut(self, how: Cut) -> None:
        """From now on, until `mend`."""
        self._do(self._begin_cut(how))

    def mend(self) -> None:
        self._do(self._mend())

    def _do(self, work) -> None:
        asyncio.run_coroutine_threadsafe(work, self._loop).result(10)

    async def _listen(self) -> None:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", self.port)
        self.port = self._server.sockets[0].getsockname()[1]
        self._cut = None
        self._open.set()

    async def _begin_cut(self, how: Cut) -> None:
        self._cut = how
        if how == "silent":
            self._open.clear()
        if how == "refused":
            self._server.close()
        if how in ("refused", "reset"):
            self._reset_all()

    async def _mend(self) -> None:
        if self._cut == "refused":
            await self._listen()
        self._cut = None
        self._open.set()

    async def _end(self) -> None:
        self._server.close()
        self._open.set()
        self._reset_all()
        if tasks := asyncio.all_tasks() - {asyncio.current_task()}:
            await asyncio.wait(tasks, timeout=5)

    def _reset_all(self) -> None:
        for writer in list(self._writers):
            _reset(writer)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self._cut == "reset":
            _reset(writer)
            return
        there_reader, there = await asyncio.open_connection("127.0.0.1", self._to)
        both = {writer, there}
        self._writers |= both
        try:
            asked = asyncio.create_task(self._pass_on(reader, there))
            await self._pass_on(there_reader, writer, answers=True)
            _reset(writer)
            await asked
        finally:
            self._writers -= both
            for one in both:
                _reset(one)

    async def _pass_on(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, answers: bool = False
    ) -> None:
        with suppress(OSError):
            while data := await reader.read(BYTES):
                await self._open.wait()
                if answers and self._cut == "halved":
                    writer.write(data[:HALF])
                    await writer.drain()
                    return
                writer.write(data)
                await writer.drain()


def _reset(writer: asyncio.StreamWriter) -> None:
    """Close with RST, at once."""
    with suppress(OSError):
        if (connection := writer.get_extra_info("socket")) is not None:
            linger = b"\x01\x00\x00\x00\x00\x00\x00\x00"
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
    writer.transport.abort()
