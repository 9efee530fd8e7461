"""The client of byte ranges, against servers that do what none should."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import pytest

from orchestra.stores.range_client import RangeAnswer, RangeClient
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


Serve = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


@asynccontextmanager
async def _client_at(
    serve: Serve, *, kind: type[RangeClient] = RangeClient, stall_timeout_s: float = 5.0
) -> AsyncIterator[RangeClient]:
    """A client of a server that does `serve` on each of its connections; who asks closes the client."""
    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with server, asyncio.timeout(10):
        url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        yield kind(url, ssl_context=None, stall_timeout_s=stall_timeout_s)


@asynccontextmanager
async def _client_of(answer: Serve) -> AsyncIterator[RangeClient]:
    """A client of a server that does `answer` on its one connection; both are over at the end of the block."""
    is_over = asyncio.Event()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await answer(reader, writer)
        await reader.read()  # until the client hangs up
        writer.close()
        is_over.set()

    async with _client_at(serve) as client:
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


ANSWER = b"HTTP/1.1 206 Partial Content\r\nContent-Length: 4\r\n\r\nbody"


async def _soon(client: RangeClient) -> RangeAnswer | BaseException:
    """What a request comes to that nobody waits for."""
    outcome: asyncio.Future[RangeAnswer | BaseException] = asyncio.Future()
    client.send_soon(b"GET /x HTTP/1.1\r\n\r\n", ByteRange(0, 4), outcome.set_result)
    return await outcome


async def test_requests_that_nobody_waits_for_are_answered_on_one_connection() -> None:
    """The first makes it, the second finds it idle; each is told of once."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        for _ in range(2):
            await reader.readuntil(b"\r\n\r\n")
            writer.write(ANSWER)

    async with _client_of(answer) as client:
        answers = [await _soon(client) for _ in range(2)]
    assert [bytes(one.data) for one in answers if isinstance(one, RangeAnswer)] == [b"body", b"body"]


async def test_a_connection_that_was_idle_too_long_is_not_an_answer() -> None:
    """The server closes it at the second request; that is sent again on another, and told of once."""
    closed: asyncio.Queue[None] = asyncio.Queue()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(ANSWER)
        with contextlib.suppress(asyncio.IncompleteReadError):
            await reader.readuntil(b"\r\n\r\n")
        writer.close()
        closed.put_nowait(None)

    async with _client_at(serve) as client:
        answers = [await _soon(client) for _ in range(2)]
        await client.close()
        for _ in range(2):
            await closed.get()
    assert [bytes(one.data) for one in answers if isinstance(one, RangeAnswer)] == [b"body", b"body"]
    assert closed.empty()


@pytest.mark.parametrize("is_idle", [False, True], ids=["fresh", "idle"])
async def test_a_request_that_is_taken_back_is_told_of_no_more(is_idle: bool) -> None:
    """Its connection is closed, and what the server says afterwards reaches nobody."""
    is_asked, is_closed = asyncio.Event(), asyncio.Event()

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if is_idle:
            await reader.readuntil(b"\r\n\r\n")
            writer.write(ANSWER)
        await reader.readuntil(b"\r\n\r\n")
        is_asked.set()
        await reader.read()
        is_closed.set()

    told: list[RangeAnswer | BaseException] = []
    async with _client_of(answer) as client:
        if is_idle:
            await _soon(client)
        take_back = client.send_soon(b"GET /x HTTP/1.1\r\n\r\n", ByteRange(0, 4), told.append)
        await is_asked.wait()
        take_back()
        await is_closed.wait()
    assert told == []


async def test_a_request_that_is_taken_back_as_it_ends_is_told_of_no_more() -> None:
    """Its task is over, and what came of it was to be told in the next turn of the loop."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(ANSWER)

    told: list[RangeAnswer | BaseException] = []
    async with _client_of(answer) as client:
        before = asyncio.all_tasks()
        take_back = client.send_soon(b"GET /x HTTP/1.1\r\n\r\n", ByteRange(0, 4), told.append)
        (sending,) = asyncio.all_tasks() - before
        while not sending.done():
            # Of what ends in this turn of the loop, this comes before whoever is told of it.
            asyncio.get_running_loop().call_soon(lambda: take_back() if sending.done() else None)
            await asyncio.sleep(0)
        await asyncio.sleep(0)
    assert told == []


class _WatchedClient(RangeClient):
    """Counts the timers that look for stalls."""

    timers = timers_max = 0

    def _look_later(self) -> None:
        self.timers += 1
        self.timers_max = max(self.timers, self.timers_max)
        super()._look_later()

    def _look_for_stalls(self) -> None:
        self.timers -= 1
        super()._look_for_stalls()


async def test_a_request_sent_when_another_has_stalled_has_its_whole_time() -> None:
    """There is one timer still: with two of them each look would come twice, and half the time be given."""
    asked: list[bytes] = []
    ends: asyncio.Queue[None] = asyncio.Queue()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(asyncio.IncompleteReadError):
            while True:
                asked.append(await reader.readuntil(b"\r\n\r\n"))
                if b"/x" in asked[-1]:
                    writer.write(ANSWER)
        writer.close()
        ends.put_nowait(None)

    async with _client_at(serve, kind=_WatchedClient, stall_timeout_s=0.1) as client:
        assert isinstance(client, _WatchedClient)
        await asyncio.gather(*(client.get("/x", {}, ByteRange(0, 4)) for _ in range(3)))  # three are idle now
        ended: asyncio.Queue[RangeAnswer | BaseException] = asyncio.Queue()

        def send_again(outcome: RangeAnswer | BaseException) -> None:
            ended.put_nowait(outcome)
            if len(asked) < 6:
                client.send_soon(b"GET /silent HTTP/1.1\r\n\r\n", ByteRange(0, 4), send_again)

        client.send_soon(b"GET /silent HTTP/1.1\r\n\r\n", ByteRange(0, 4), send_again)
        for _ in range(3):
            assert isinstance(await ended.get(), TimeoutError)
        await client.close()
        for _ in range(3):
            await ends.get()
    assert (client.timers_max, client.timers) == (1, 0)
