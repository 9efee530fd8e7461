"""The client of byte ranges, against servers that do what none should."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import pytest

from orchestra.stores.range_client import RangeClient
from orchestra.values import ByteRange


async def test_a_request_that_outlives_its_client_still_has_its_timeout() -> None:
    """A server takes a request and says nothing; the client is closed meanwhile; the request ends by the timeout."""
    is_asked = asyncio.Event()

    async def say_nothing(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        is_asked.set()
        await reader.read()  # until the client gives up
        writer.close()

    server = await asyncio.start_server(say_nothing, "127.0.0.1", 0)
    async with server:
        url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        client = RangeClient(url, ssl_context=None, stall_timeout_s=0.1)
        request = asyncio.create_task(client.get("/x", {}, ByteRange(0, 1)))
        await is_asked.wait()
        client.close_idle()
        with pytest.raises(TimeoutError, match="no byte for"):
            async with asyncio.timeout(10):
                await request


@asynccontextmanager
async def _client_of(
    answer: Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]],
) -> AsyncIterator[RangeClient]:
    """A client of a server that does `answer` on its one connection; both are over at the end of the block."""
    is_over = asyncio.Event()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await answer(reader, writer)
        await reader.read()  # until the client hangs up
        writer.close()
        is_over.set()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with server, asyncio.timeout(10):
        url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        client = RangeClient(url, ssl_context=None, stall_timeout_s=5.0)
        try:
            yield client
        finally:
            await client.close()
            await is_over.wait()


@pytest.mark.parametrize("size", [0, 1, 50_000, 3_000_000])
@pytest.mark.parametrize("padding", [0, 1500, 40_000])
@pytest.mark.parametrize("cut", [10, 300, 2500])
async def test_a_body_is_whole_however_it_comes(size: int, padding: int, cut: int) -> None:
    """Long heads and short ones, bodies that come with their head and after it: the same bytes each time."""
    body = (bytes(number * 7 % 251 for number in range(251)) * (size // 251 + 1))[:size]
    whole = f"HTTP/1.1 206 Partial Content\r\nContent-Length: {size}\r\nx-pad: {'p' * padding}\r\n\r\n".encode() + body

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        for _ in range(2):
            await reader.readuntil(b"\r\n\r\n")
            for piece in (whole[:cut], whole[cut:]):
                writer.write(piece)
                await writer.drain()
                await asyncio.sleep(0)

    async with _client_of(answer) as client:
        answers = [await client.get("/x", {}, ByteRange(0, size)) for _ in range(2)]
    assert [(answer.status, bytes(answer.data)) for answer in answers] == [(206, body), (206, body)]


async def test_what_a_server_sends_unasked_changes_no_answer() -> None:
    """Bytes after a body reach nobody: the answer before them stays as it was, and its connection is closed."""
    is_received = asyncio.Event()
    is_closed = asyncio.Event()

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 206 Partial Content\r\nContent-Length: 4\r\n\r\nbody")
        await is_received.wait()
        writer.write(b"HTTP/1.1 206 Partial Content\r\nContent-Length: 4\r\n\r\nmore")
        await reader.read()
        is_closed.set()

    async with _client_of(answer) as client:
        received = await client.get("/x", {}, ByteRange(0, 4))
        is_received.set()
        await is_closed.wait()
    assert bytes(received.data) == b"body"
