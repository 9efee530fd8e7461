"""The routes that misses take, without a web framework around them.

A cold file costs the daemon one POST /v1/ensure. Of the CPU that such a request took through aiohttp, half was aiohttp
(docs/decisions/0003-hot-route.md). So this protocol stands in front of aiohttp's on each connection: a whole ensure
request, as our client sends it, is answered here; a connection that asks to become a stream of such requests is given
to `stream.py`; everything else goes on to aiohttp, byte for byte.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

from aiohttp.web_protocol import RequestHandler

from orchestra.daemon.api.context import encoded
from orchestra.daemon.api.stream import UPGRADE, EnsureStream

_HOT = b"POST /v1/ensure HTTP/1.1\r\n"
_LENGTH = b"content-length:"

HotHandler = Callable[[bytes], Awaitable[tuple[int, dict[str, Any]]]]
StreamMaker = Callable[[asyncio.Transport], EnsureStream]


class HotConnection(asyncio.Protocol):
    """One connection. `inner` is aiohttp's protocol for it; our client never sends a request before the last one's
    answer, and any other client's requests go to `inner` in order."""

    def __init__(self, inner: RequestHandler, handle: HotHandler, make_stream: StreamMaker) -> None:
        self._inner = inner
        self._handle = handle
        self._make_stream = make_stream
        self._stream: EnsureStream | None = None
        self._transport: asyncio.Transport | None = None
        self._task: asyncio.Task[None] | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """See asyncio.BaseProtocol."""
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        self._inner.connection_made(transport)

    def data_received(self, data: bytes) -> None:
        """See asyncio.Protocol."""
        if self._stream is not None:
            self._stream.data_received(data)
            return
        if data.startswith(UPGRADE) and self._transport is not None:
            self._upgrade(data)
            return
        if self._task is None and data.startswith(_HOT):
            body = _body_of(data)
            if body is not None:
                self._task = asyncio.create_task(self._answer(body))
                return
        self._inner.data_received(data)

    def _upgrade(self, data: bytes) -> None:
        """The head comes in one piece with (some of) the first lines, as our client sends it, or not at all."""
        assert self._transport is not None
        end = data.find(b"\r\n\r\n")
        if end < 0:
            self._transport.abort()
            return
        self._stream = self._make_stream(self._transport)
        self._stream.data_received(data[end + 4 :])

    async def _answer(self, body: bytes) -> None:
        try:
            status, answer = await self._handle(body)
            payload = encoded(answer)
            head = b"HTTP/1.1 %d -\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
            if self._transport is not None:
                self._transport.write(head % (status, len(payload)) + payload)
        finally:
            self._task = None

    def close_if_idle(self) -> None:
        """Close the connection if no request is under way on it; its client connects anew for the next."""
        # aiohttp's own close() leaves the transport open while it waits for a request.
        if self._task is None and self._stream is None and self._inner._current_request is None:
            self._inner.force_close()

    def eof_received(self) -> bool | None:
        """See asyncio.Protocol."""
        self._inner.eof_received()
        return None

    def connection_lost(self, exc: BaseException | None) -> None:
        """See asyncio.BaseProtocol. A fetch that was asked for goes on: others may wait for it, and it is kept."""
        self._transport = None
        self._inner.connection_lost(exc)

    def pause_writing(self) -> None:
        """See asyncio.BaseProtocol."""
        self._inner.pause_writing()

    def resume_writing(self) -> None:
        """See asyncio.BaseProtocol."""
        self._inner.resume_writing()


def _body_of(data: bytes) -> bytes | None:
    """Return the body if `data` is one whole request with a plain length, else None."""
    end = data.find(b"\r\n\r\n")
    if end < 0:
        return None
    head = data[:end].lower()
    at = head.find(_LENGTH)
    if at < 0 or b"transfer-encoding" in head or b"expect:" in head:
        return None
    line = head[at + len(_LENGTH) :].split(b"\r\n", 1)[0].strip()
    body = data[end + 4 :]
    return body if line.isdigit() and int(line) == len(body) else None
