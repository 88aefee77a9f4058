"""What stands before the embedded server's routes: the key, and bounds on size and time.

A route sees a request only if it carries the key and its whole body is there.  So nobody without
the key makes the server read much, and nobody at all keeps half a request open for long, or an
answer that it does not read.
"""

from __future__ import annotations

import asyncio
import resource
from collections.abc import Callable
from contextlib import suppress
from hmac import compare_digest
from typing import Any

from fastapi.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.auto import AutoHTTPProtocol

CLIENT_TIMEOUT_S = 20.0
"""From connecting, or the end of an answer, to the last header of the next request; and for how
long a client may read nothing of what it is sent [s]."""
MOST_CONNECTIONS = 4096
"""Of one more the one is ended that has been without a request for longest."""
KEYLESS_BYTES = 1024
"""Of a body that comes without the key."""
BODY_TIMEOUT_S = 120.0
"""From the last header to the last byte of the body [s]."""
READ_ON_S = 10.0
"""How long a body that is too large is still read [s]."""


class Gate:
    """Asks for the key, then reads the body.

    Args:
        api_key: what requests must carry as a bearer token, except for /health...; None: nothing.
        most_bytes: path -> the largest body [bytes].
    """

    def __init__(self, app: ASGIApp, api_key: str | None, most_bytes: Callable[[str], int]):
        self.app, self.most_bytes = app, most_bytes
        self._expected = None if api_key is None else f"Bearer {api_key}".encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        if scope["http_version"] not in ("1.0", "1.1"):
            return await _refuse(400, "HTTP/1.1 is spoken here")(scope, receive, send)
        headers = dict(scope["headers"])
        if not self._may_enter(scope["path"], headers.get(b"authorization", b"")):
            return await JSONResponse({"error": "Unauthorized"}, 401)(scope, receive, send)
        keyless = self._expected is not None and scope["path"].startswith("/health")
        most = KEYLESS_BYTES if keyless else self.most_bytes(scope["path"])
        try:
            async with asyncio.timeout(BODY_TIMEOUT_S):
                body = await _body(receive, most, int(headers.get(b"content-length", b"0")))
        except TimeoutError:
            return await _refuse(408, "the body did not come in time")(scope, receive, send)
        except OverflowError as error:
            answer = _reading_on(receive, send) if error.args else send
            large = _refuse(413, f"the body has more than {most} bytes")
            return await large(scope, receive, answer)
        if body is None:
            return None
        unread: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

        async def replay() -> Message:
            return unread.pop() if unread else await receive()

        return await self.app(scope, replay, send)

    def _may_enter(self, path: str, given: bytes) -> bool:
        if self._expected is None or path.startswith("/health"):
            return True
        return compare_digest(given, self._expected)


def room_for_connections() -> int:
    """How many there may be: half of the files that this process may open, of which it lets itself
    have as many as it can."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        soft = hard
    return min(MOST_CONNECTIONS, soft // 2)


async def _body(receive: Receive, most: int, announced: int) -> bytes | None:
    """The whole body; None if the client left.

    Raises:
        OverflowError: it is too large; has an argument if some of it is unread.
    """
    pieces: list[bytes] = []
    size, more = 0, True
    while more:
        if max(size, announced) > most:
            raise OverflowError("unread")
        message = await receive()
        if message["type"] == "http.disconnect":
            return None
        pieces.append(message.get("body", b""))
        size += len(pieces[-1])
        more = message.get("more_body", False)
    if size > most:
        raise OverflowError
    return b"".join(pieces)


def _reading_on(receive: Receive, send: Send) -> Send:
    """Sends an answer, and reads on for a while before it ends: whoever still writes when the
    connection is closed never sees the answer."""

    async def answer(message: Message) -> None:
        if message["type"] != "http.response.body":
            return await send(message)
        await send({**message, "more_body": True})
        with suppress(TimeoutError):
            async with asyncio.timeout(READ_ON_S):
                while (await receive()).get("more_body", False):
                    pass
        await send({"type": "http.response.body", "body": b""})

    return answer


def _refuse(status: int, message: str) -> JSONResponse:
    return JSONResponse({"error": {"message": message}}, status, headers={"connection": "close"})


_Protocol: Any = AutoHTTPProtocol  # one of several classes, without a type of their own


class BoundedProtocol(_Protocol):
    """uvicorn's HTTP with an end to every wait for a client, and a bound on connections.

    By itself it waits for ever for the rest of a header, and for a client to read an answer.
    """

    most = MOST_CONNECTIONS

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._unread, self._ended = 0, False
        self._since = self.loop.time()
        self._looking = self.loop.call_later(0, self._look)
        others = [other for other in self.connections if not other._ended]
        if len(others) > self.most:  # who says something in time keeps its connection
            idle = [other for other in others if not other._in_request()]
            min(idle, key=lambda other: other._since)._end()

    def connection_lost(self, exc: Exception | None) -> None:
        self._looking.cancel()
        super().connection_lost(exc)

    def on_response_complete(self) -> None:
        self._since = self.loop.time()
        super().on_response_complete()

    def _in_request(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    def _look(self) -> None:
        """End the connection if its client has let us wait for too long."""
        before, self._unread = self._unread, self.transport.get_write_buffer_size()
        now = self.loop.time()
        if self._unread < before or (self._in_request() and not self._unread):
            self._since = now  # it reads, or waits for us
        if now - self._since > CLIENT_TIMEOUT_S:
            self._end()
        else:
            self._looking = self.loop.call_later(CLIENT_TIMEOUT_S / 8, self._look)

    def _end(self) -> None:
        self._ended = True
        self.transport.abort()
