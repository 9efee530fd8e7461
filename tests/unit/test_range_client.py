"""The client of byte ranges, against servers that do what none should."""

from __future__ import annotations

import asyncio

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
