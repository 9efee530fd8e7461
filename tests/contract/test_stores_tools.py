"""The tools that other tests lean on: the S3 server in a process of its own, and the fault proxy."""

from __future__ import annotations

import asyncio
import os
import select
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import aiohttp
import pytest

from orchestra.testing.fault_proxy import Cut, Delay, FaultProxy, Flip, Header, Stall, Status
from orchestra.testing.s3_server import S3Server
from tests.support.web_servers import plain_server


@pytest.fixture
def upstream(tmp_path: Path) -> Iterator[str]:
    (tmp_path / "file").write_bytes(b"0123456789")
    with plain_server(tmp_path) as url:
        yield url


@pytest.fixture
def proxy(upstream: str) -> Iterator[FaultProxy]:
    with FaultProxy(upstream) as proxy:
        yield proxy


async def fetch(proxy: FaultProxy, path: str = "/file") -> tuple[int, bytes]:
    async with aiohttp.ClientSession() as session, session.get(proxy.endpoint + path) as answer:
        return answer.status, await answer.read()


async def test_a_proxy_without_a_script_is_not_there(proxy: FaultProxy) -> None:
    """What is asked reaches the server and comes back whole; the log says what that was."""
    assert await fetch(proxy) == (200, b"0123456789")
    assert (await fetch(proxy, "/nothing?x=1"))[0] == 404
    assert [(request.method, request.path, request.status) for request in proxy.requests] == [
        ("GET", "/file", 200),
        ("GET", "/nothing?x=1", 404),
    ]
    assert proxy.requests[0].body_bytes == 10


async def test_faults_happen_to_the_requests_that_were_named(proxy: FaultProxy) -> None:
    """`at`, `times`, `method` and `path` choose; two faults of one time each happen one after the other."""
    late = proxy.add(Status(503, retry_after="1"), path="/file", at=3, times=2)
    other = proxy.add(Status(500), path="/other", times=None)
    posts = proxy.add(Status(418), method="POST")
    assert [(await fetch(proxy))[0] for _ in range(6)] == [200, 200, 503, 503, 200, 200]
    assert [(await fetch(proxy, "/other"))[0] for _ in range(2)] == [500, 500]
    first, second = proxy.add(Status(501), path="/file"), proxy.add(Status(502), path="/file")
    assert [(await fetch(proxy))[0] for _ in range(3)] == [501, 502, 200]
    assert [fault.fired for fault in (late, other, posts, first, second)] == [2, 2, 0, 1, 1]


async def test_bodies_are_cut_flipped_delayed_and_relabelled(proxy: FaultProxy) -> None:
    """Each action on an answer does what it says, at the byte that was named."""
    proxy.add(Flip(), at_byte=3)
    assert await fetch(proxy) == (200, b"012\xcc456789")
    proxy.add(Cut(), at_byte=4)
    with pytest.raises(aiohttp.ClientPayloadError):
        await fetch(proxy)
    no_answer = proxy.add(Cut(), times=None)  # the client may try an unanswered GET again by itself
    with pytest.raises(aiohttp.ServerDisconnectedError):
        await fetch(proxy)
    assert no_answer.fired >= 1
    proxy.reset()
    delay = proxy.add(Delay(0.01), at_byte=5)
    assert await fetch(proxy) == (200, b"0123456789")
    proxy.add(Header("X-Added", "yes"))
    async with aiohttp.ClientSession() as session, session.get(proxy.endpoint + "/file") as answer:
        assert answer.headers["X-Added"] == "yes"
    assert delay.fired == 1


async def test_a_stall_lasts_until_it_is_released(proxy: FaultProxy) -> None:
    """A stalled answer goes on where it stopped."""
    stall = proxy.add(Stall(), at_byte=5)
    fetching = asyncio.create_task(fetch(proxy))
    await stall.wait_fired_async()
    assert not fetching.done()
    stall.release()
    assert await fetching == (200, b"0123456789")


async def test_stopping_ends_a_stall(upstream: str) -> None:
    """A proxy stops though a client waits; the client's connection ends."""
    proxy = FaultProxy(upstream)
    proxy.start()
    stall = proxy.add(Stall())
    fetching = asyncio.create_task(fetch(proxy))
    await stall.wait_fired_async()
    await asyncio.to_thread(proxy.stop)
    with pytest.raises(aiohttp.ClientError):
        await fetching
    proxy.stop()


def test_a_stopped_server_is_gone() -> None:
    """`stop` ends the process, and may be called again; a refused command says why."""
    with S3Server() as server:
        server.create_bucket("bucket")
        assert server.put("bucket", "k", b"hello") == '"5d41402abc4b2a76b9719d911017c592"'
        with pytest.raises(RuntimeError, match="refused 'put'"):
            server.put("no-such-bucket", "k", b"")
        server.stop()
        server.stop()
        with pytest.raises(ValueError, match="closed file"):
            server.create_bucket("other")


@pytest.mark.system
def test_a_killed_parent_leaves_no_server() -> None:
    """The server ends when its parent is killed with -9."""
    script = (
        "import signal, os, sys; from orchestra.testing.s3_server import S3Server; server = S3Server();"
        "print(server._process.pid, flush=True); sys.stdin.read()"
    )
    with subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as parent:
        assert parent.stdout is not None
        child = os.pidfd_open(int(parent.stdout.readline()))
        parent.send_signal(signal.SIGKILL)
        parent.wait()
        ended, _, _ = select.select([child], [], [], 20)  # a pidfd is readable when its process has ended
        os.close(child)
        assert ended
