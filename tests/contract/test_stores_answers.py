"""Answers byte by byte: a server that sends exactly what the test says, in the pieces that the test says, to the
client that reads ranges. Right bytes, or an error that says whether a retry is worth it; never anything else."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from orchestra.clock import SystemClock
from orchestra.errors import (
    AccessDeniedError,
    OrchestraError,
    StaleObjectError,
    StoreError,
    StoreUnavailableError,
)
from orchestra.stores.http_client import HttpClient, HttpSettings
from orchestra.stores.translate import Operation, ThrottledError
from orchestra.values import ByteRange
from tests.support.scripted_server import ScriptedServer

SPAN = ByteRange(2, 6)
PLAIN = b'HTTP/1.1 206 Partial\r\nETag: "abc"\r\nContent-Range: bytes 2-5/10\r\nContent-Length: 4\r\n\r\n2345'
CHUNKED = b'HTTP/1.1 206 P\r\nETag: "abc"\r\nContent-Range: bytes 2-5/10\r\nTransfer-Encoding: chunked\r\n\r\n'


@pytest.fixture
async def server() -> AsyncIterator[ScriptedServer]:
    async with ScriptedServer().running() as scripted:
        yield scripted


@pytest.fixture
async def client() -> AsyncIterator[HttpClient]:
    client = HttpClient(HttpSettings(requests_max=4, attempt_timeout_s=0.2), SystemClock())
    yield client
    await client.close()


async def fetch(client: HttpClient, server: ScriptedServer) -> bytes:
    data = await client.fetch_range(
        server.url,
        {"host": server.url.split("/")[2], "range": "bytes=2-5", "if-match": '"abc"'},
        Operation("read", "k", "s3://bucket/"),
        byte_range=SPAN,
        size_bytes=10,
        version='"abc"',
    )
    return bytes(data)


@given(cuts=st.lists(st.integers(1, len(PLAIN) - 1), unique=True).map(sorted))
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_an_answer_may_arrive_in_any_pieces(cuts: list[int]) -> None:
    """The right bytes come out wherever the answer is cut on its way, and the connection is used again."""

    async def scenario() -> None:
        server = ScriptedServer()
        listening = await asyncio.start_server(server.serve, "127.0.0.1", 0)
        server.url = f"http://127.0.0.1:{listening.sockets[0].getsockname()[1]}/bucket/k"
        edges = [0, *cuts, len(PLAIN)]
        server.answers = [[PLAIN[start:stop] for start, stop in itertools.pairwise(edges)]]
        client = HttpClient(HttpSettings(requests_max=4, attempt_timeout_s=20.0), SystemClock())
        assert [await fetch(client, server) for _ in range(2)] == [b"2345", b"2345"]
        assert server.connections == 1
        await client.close()
        listening.close()
        await server.stop()

    asyncio.run(scenario())


def answer(status: str, headers: str, body: bytes = b"") -> bytes:
    return f"HTTP/1.1 {status}\r\n{headers}\r\n".encode() + body


GOOD = 'ETag: "abc"\r\nContent-Range: bytes 2-5/10\r\n'


@pytest.mark.parametrize(
    ("sent", "kind"),
    [
        (answer("206 P", GOOD + "Content-Length: 3\r\n", b"234"), StoreUnavailableError),
        (answer("206 P", GOOD + "Content-Length: 5\r\n", b"23456"), StoreUnavailableError),
        (answer("206 P", GOOD + "Content-Length: 4\r\n", b"23456789"), StoreUnavailableError),
        (answer("206 P", GOOD + "Content-Length: -4\r\n", b"2345"), StoreUnavailableError),
        (answer("206 P", GOOD + "Content-Length: 99999999999\r\n", b"2345"), StoreUnavailableError),
        (answer("206 P", GOOD + "Content-Length: 4\r\n", b"23"), StoreUnavailableError),
        (answer("206 P", 'ETag: "abc"\r\nContent-Length: 4\r\n', b"2345"), StoreUnavailableError),
        (answer("206 P", GOOD.replace("2-5", "3-6") + "Content-Length: 4\r\n", b"3456"), StoreUnavailableError),
        (answer("206 P", GOOD.replace("/10", "/11") + "Content-Length: 4\r\n", b"2345"), StaleObjectError),
        (answer("206 P", GOOD.replace("abc", "xyz") + "Content-Length: 4\r\n", b"2345"), StaleObjectError),
        (answer("206 P", "Content-Range: bytes 2-5/10\r\nContent-Length: 4\r\n", b"2345"), StaleObjectError),
        (answer("206 P", GOOD + "Content-Encoding: gzip\r\nContent-Length: 4\r\n", b"2345"), StoreError),
        (answer("412 Precondition Failed", "Content-Length: 0\r\n"), StaleObjectError),
        (answer("416 Range", "Content-Length: 0\r\n"), StaleObjectError),
        (answer("403 Forbidden", "Content-Length: 0\r\n"), AccessDeniedError),
        (answer("503 Busy", "Content-Length: 0\r\n"), ThrottledError),
        (answer("500 Oops", "Content-Length: 70000\r\n", b"x" * 70000), StoreUnavailableError),
        (answer("204 Nothing", ""), StoreUnavailableError),
        (answer("301 Moved", "Location: http://169.254.169.254/\r\nContent-Length: 0\r\n"), StoreError),
        (b"220 smtp.example ready\r\n\r\n", StoreUnavailableError),
        (b"\x16\x03\x01\x02\x00\x01\r\n\r\n", StoreUnavailableError),
        (b"HTTP/1.1 banana\r\n\r\n", StoreUnavailableError),
        (b"HTTP/1.1 206 P\r\nX: " + b"y" * 70_000, StoreUnavailableError),
        (b"HTTP/1.1 206 P\r\n" + b"A: b\r\n" * 20_000, StoreUnavailableError),
        (b"HTTP/1.1 206 P\r\nETag", StoreUnavailableError),
        (b"", StoreUnavailableError),
    ],
    ids=lambda value: value[:60].decode("latin-1") if isinstance(value, bytes) else value.__name__,
)
@pytest.mark.parametrize("hang_up", [True, False], ids=["closed", "open"])
async def test_a_bad_answer_is_an_error_of_its_kind(
    server: ScriptedServer, client: HttpClient, sent: bytes, kind: type[OrchestraError], hang_up: bool
) -> None:
    """Each way to be wrong is one of our errors in one line, at once or after the stall time; then all is well."""
    server.answers, server.hang_up = [[sent]], hang_up
    outcomes: list[bytes | type[OrchestraError]] = []
    for _ in range(2):  # the range client's verdict, and where it hands over, the general client's
        try:
            outcomes.append(await fetch(client, server))
        except OrchestraError as error:
            assert str(error).isprintable()
            outcomes.append(type(error))
    if sent.endswith(b"23456789"):  # a right answer with bytes of nobody behind it: never part of the data
        assert set(outcomes) <= {b"2345", StoreUnavailableError}
    else:
        assert outcomes[-1] is kind or outcomes[0] is kind
        assert b"2345" not in outcomes
    server.answers, server.hang_up = [[PLAIN]], False
    recovered = [outcome async for outcome in attempts(client, server)]
    assert recovered[-1] == b"2345"


async def attempts(client: HttpClient, server: ScriptedServer) -> AsyncIterator[bytes | type[OrchestraError]]:
    """Try until it succeeds, three times at most: as the retry would."""
    for _ in range(3):
        try:
            data = await fetch(client, server)
        except StoreUnavailableError as error:
            yield type(error)
            continue
        yield data
        return


async def test_chunked_answers_are_read(server: ScriptedServer, client: HttpClient) -> None:
    """A server that answers ranges in chunks costs one failed try, then none."""
    server.answers = [[CHUNKED + b"2\r\n23\r\n2\r\n45\r\n0\r\n\r\n"]]
    with pytest.raises(StoreUnavailableError):
        await fetch(client, server)
    assert [await fetch(client, server) for _ in range(3)] == [b"2345"] * 3


async def test_a_server_that_ignores_ranges_is_cut(server: ScriptedServer, client: HttpClient) -> None:
    """A server that sends the whole object costs one failed try, then the range is cut out of it."""
    server.answers = [[answer("200 OK", 'ETag: "abc"\r\nContent-Length: 10\r\n', b"0123456789")]]
    with pytest.raises(StoreUnavailableError):
        await fetch(client, server)
    assert [await fetch(client, server) for _ in range(3)] == [b"2345"] * 3


async def test_an_idle_connection_that_was_closed_is_no_failure(server: ScriptedServer, client: HttpClient) -> None:
    """A server may close a connection between two requests; the second goes over a new one."""
    server.answers, server.hang_up = [[PLAIN]], True
    assert [await fetch(client, server) for _ in range(3)] == [b"2345"] * 3
    assert server.connections == 3


async def test_what_is_sent_is_what_was_given(server: ScriptedServer, client: HttpClient) -> None:
    """Range, condition and host stand in the request once each; no encoding is accepted."""
    server.answers = [[PLAIN]]
    await fetch(client, server)
    lines = server.requests[0].decode().lower().split("\r\n")
    assert lines[0] == "get /bucket/k http/1.1"
    for wanted in ("range: bytes=2-5", 'if-match: "abc"', "accept-encoding: identity"):
        assert lines.count(wanted) == 1
    assert len([line for line in lines if line.startswith("host:")]) == 1
