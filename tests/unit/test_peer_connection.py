"""What another node asks for is answered from the files here, in the order in which it asks."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, cast

import pytest

from orchestra.clock import SystemClock
from orchestra.cluster.peer_client import PeerClient
from orchestra.cluster.peer_wire import ExtentPart
from orchestra.daemon.api.context import Activity
from orchestra.daemon.api.peer import PeerConnection
from orchestra.daemon.peers import PeerService
from orchestra.values import ByteRange, ObjectId
from tests.support.cache import BLOCK, GEOMETRY, Cache, data_of
from tests.support.ram import ram_folder

DATA = data_of("a", 4 * BLOCK)
NAME = ObjectId("test://", "a", "v")


@pytest.fixture
def tmp_path() -> Iterator[Path]:
    """In memory: see tests/support/ram.py."""
    with ram_folder() as folder:
        yield folder


def block(index: int) -> ExtentPart:
    """A block of the object."""
    return ExtentPart(NAME, NAME.digest(), len(DATA), 0, ByteRange(index * BLOCK, (index + 1) * BLOCK))


@asynccontextmanager
async def node_with_data(folder: Path) -> AsyncIterator[int]:
    """A node that holds the object; its port."""
    cache = Cache(folder)
    cache.put("a", DATA)
    nothing = cast("Any", None)  # what is held needs no engine, and nobody asks for anything but blocks
    service = PeerService(nothing, cache.store, GEOMETRY, nothing, nothing)
    made = lambda: PeerConnection(nothing, service, None, Activity(SystemClock()))  # noqa: E731
    server = await asyncio.get_running_loop().create_server(made, "127.0.0.1", 0)
    try:
        yield server.sockets[0].getsockname()[1]
    finally:
        server.close()
        service.close()


async def test_the_next_request_may_come_before_the_end_of_an_answer_is_known(tmp_path: Path) -> None:
    """Who asks has an answer before the loop that answers hears that a thread has sent it: both are given."""
    async with node_with_data(tmp_path) as port:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        asked = (block(2), block(1))
        for part in asked:
            writer.write(f"GET {part.target} HTTP/1.1\r\nRange: {part.range_header}\r\n\r\n".encode())
        for part in asked:
            head = await reader.readuntil(b"\r\n\r\n")
            assert head.startswith(b"HTTP/1.1 206 ")
            assert await reader.readexactly(BLOCK) == DATA[part.file_range.start : part.file_range.stop]
        writer.close()


async def test_blocks_asked_for_one_after_the_other_need_one_connection(tmp_path: Path) -> None:
    """A connection is used again as soon as its answer is here."""
    async with node_with_data(tmp_path) as port:
        client = PeerClient(f"127.0.0.1:{port}", block_size_bytes=BLOCK)
        for index in [*range(4)] * 25:
            data = await client.fetch_alone(block(index))
            assert data == DATA[index * BLOCK : (index + 1) * BLOCK]
        assert client.connections_count == 1
        client.close_idle()
