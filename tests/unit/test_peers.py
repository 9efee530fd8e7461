"""Peers that fail in every way there is: each is a counted cause within its timeout, and the next one gives the bytes.

The peers are servers of this test that speak just enough of the wire; each counts how often its fault struck.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import replace

import crc32c
import pytest

from orchestra.clock import SystemClock
from orchestra.cluster.peer_blocks import OK, WORKING, Frame
from orchestra.cluster.peer_wire import ExtentPart, encode_checksums
from orchestra.cluster.peers import Peers
from orchestra.cluster.records import NodeRecord
from orchestra.values import ByteRange, ObjectId

BLOCK = 512 * 1024
DATA = bytes(range(256)) * 2048 * 2  # two blocks
SMALL = b"a small object" * 100
NAME = ObjectId("s3://bucket/", "large", '"v1"')
SMALL_NAME = ObjectId("s3://bucket/", "small", '"v1"')
LARGE_PART = ExtentPart(NAME, NAME.digest(), len(DATA), 0, ByteRange(0, len(DATA)))
SMALL_PART = ExtentPart(SMALL_NAME, SMALL_NAME.digest(), len(SMALL), 0, ByteRange(0, len(SMALL)))
STALL_S = 0.2

Writer = asyncio.StreamWriter
Answer = Callable[[Writer, bool], Awaitable[None]]


def head_of(length: int, checksums: str) -> bytes:
    return f"HTTP/1.1 206 -\r\nOrchestra-Crc32c: {checksums}\r\nContent-Length: {length}\r\n\r\n".encode()


def large_answer(data: bytes, of: bytes = DATA) -> bytes:
    blocks = [of[at : at + BLOCK] for at in range(0, len(of), BLOCK)]
    return head_of(len(data), encode_checksums([crc32c.crc32c(block) for block in blocks])) + data


def small_answer(data: bytes, of: bytes = SMALL, digest: str = SMALL_NAME.digest(), index: int = 0) -> bytes:
    frame = Frame(bytes.fromhex(digest), 0, len(data), crc32c.crc32c(of), OK, index).pack() + data
    return stream_of(frame) + b"0\r\n\r\n"


def stream_of(chunk: bytes) -> bytes:
    return b"HTTP/1.1 200 -\r\nTransfer-Encoding: chunked\r\n\r\n%x\r\n%b\r\n" % (len(chunk), chunk)


class FaultyPeer:
    """A peer that answers every request by `answer`; `struck` counts them."""

    def __init__(self, answer: Answer) -> None:
        self._answer = answer
        self.struck = 0
        self.released = asyncio.Event()
        self._serving: set[asyncio.Task[object] | None] = set()

    async def serve(self, reader: asyncio.StreamReader, writer: Writer) -> None:
        self._serving.add(asyncio.current_task())  # a loop does not: what hangs would be collected, with a warning
        try:
            while head := await reader.readuntil(b"\r\n\r\n"):
                is_small = head.startswith(b"POST")
                if is_small:
                    length = next(line for line in head.lower().split(b"\r\n") if line.startswith(b"content-length"))
                    await reader.readexactly(int(length.split(b":")[1]))
                self.struck += 1
                await self._answer(writer, is_small)
        except (asyncio.IncompleteReadError, ConnectionError, asyncio.CancelledError):
            pass  # the client went away, or the test is over: streams report a cancelled handler as an error
        finally:
            writer.close()


async def right(writer: Writer, is_small: bool) -> None:
    writer.write(small_answer(SMALL) if is_small else large_answer(DATA))


async def hang(writer: Writer, is_small: bool) -> None:
    await asyncio.Event().wait()


async def hang_half_way(writer: Writer, is_small: bool) -> None:
    whole = small_answer(SMALL) if is_small else large_answer(DATA)
    writer.write(whole[: len(whole) // 2])
    await asyncio.Event().wait()


async def cut(writer: Writer, is_small: bool) -> None:
    whole = small_answer(SMALL) if is_small else large_answer(DATA)
    writer.write(whole[: len(whole) // 2])
    writer.close()


async def lie(writer: Writer, is_small: bool) -> None:
    wrong = bytearray(SMALL if is_small else DATA)
    wrong[-1] ^= 1
    writer.write(small_answer(bytes(wrong)) if is_small else large_answer(bytes(wrong)))


async def say_less(writer: Writer, is_small: bool) -> None:
    writer.write(small_answer(SMALL[:-1], SMALL[:-1]) if is_small else large_answer(DATA[:-1]))


async def say_more(writer: Writer, is_small: bool) -> None:
    writer.write(small_answer(SMALL + b"x") if is_small else large_answer(DATA + b"x"))


async def forget_checksums(writer: Writer, is_small: bool) -> None:
    writer.write(small_answer(SMALL, digest="0" * 32) if is_small else head_of(len(DATA), "") + DATA)


async def talk_rubbish(writer: Writer, is_small: bool) -> None:
    writer.write(b"SSH-2.0-OpenSSH_9.6\r\n\r\n" + bytes(100))


async def refuse(writer: Writer, is_small: bool) -> None:
    writer.write(b"HTTP/1.1 403 -\r\nContent-Length: 4\r\n\r\nno: ")


async def fail(writer: Writer, is_small: bool) -> None:
    writer.write(b"HTTP/1.1 502 -\r\nContent-Length: 0\r\n\r\n")


FAULTS = {
    "hung": (hang, "no_progress"),
    "hung half way": (hang_half_way, "no_progress"),
    "cut short": (cut, "cut_short"),
    "lying": (lie, "checksum"),
    "too short": (say_less, "unreadable"),
    "too long": (say_more, "unreadable"),
    "without checksums, or of another object": (forget_checksums, "unreadable"),
    "no peer at all": (talk_rubbish, "unreadable"),
    "another secret": (refuse, "refused"),
    "its store failed": (fail, "store_failed"),
}


@asynccontextmanager
async def peers_of(*answers: Answer) -> AsyncIterator[tuple[Peers, list[FaultyPeer]]]:
    """Nodes a, b ... that answer so."""
    peers = Peers(SystemClock(), None, block_size_bytes=BLOCK, connect_timeout_s=0.5, stall_timeout_s=STALL_S)
    served, servers = [FaultyPeer(answer) for answer in answers], []
    for name, peer in zip("abcd", served, strict=False):
        server = await asyncio.start_server(peer.serve, "127.0.0.1", 0)
        servers.append(server)
        port = server.sockets[0].getsockname()[1]
        peers.connect(NodeRecord(name, f"127.0.0.1:{port}", 1))
    try:
        yield peers, served
    finally:
        peers.close()
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)
        for server in servers:
            server.close()


@pytest.mark.parametrize("part", [LARGE_PART, SMALL_PART], ids=["large", "small"])
@pytest.mark.parametrize("fault", FAULTS)
async def test_what_a_faulty_peer_does_not_give_the_next_one_does(fault: str, part: ExtentPart) -> None:
    """Its cause is counted, nothing of what it sent is used, and the bytes come from the next owner."""
    answer, cause = FAULTS[fault]
    async with peers_of(answer, right) as (peers, served):
        data = await peers.read(replace(part, priority=3), ("a", "b"))  # is not hedged
        assert data is not None
        assert bytes(data) == (DATA if part is LARGE_PART else SMALL)
        assert [peer.struck for peer in served] == [1, 1]
        assert peers.counts()["a"].failures == {cause: 1}
        assert peers.counts()["b"].failures == {}


async def test_a_port_that_nobody_listens_on_is_a_refused_connection() -> None:
    """A daemon that died: the kernel says so at once."""
    async with peers_of(right) as (peers, _):
        with socket.socket() as closed:
            closed.bind(("127.0.0.1", 0))
            peers.connect(NodeRecord("z", f"127.0.0.1:{closed.getsockname()[1]}", 1))
            assert await peers.read(LARGE_PART, ("z", "a")) is not None
        assert peers.counts()["z"].failures == {"connect_refused": 1}


async def test_a_machine_that_takes_no_connection_is_given_up_in_time() -> None:
    """A full backlog answers as a cut link does: with nothing."""
    async with peers_of(right) as (peers, _):
        with socket.socket() as full, socket.socket() as first, socket.socket() as second:
            full.bind(("127.0.0.1", 0))
            full.listen(0)
            for client in (first, second):
                client.setblocking(False)
                client.connect_ex(full.getsockname())
            peers.connect(NodeRecord("z", f"127.0.0.1:{full.getsockname()[1]}", 1))
            assert await peers.read(replace(SMALL_PART, priority=3), ("z", "a")) == SMALL
            peers.connect(NodeRecord("z", f"127.0.0.1:{full.getsockname()[1]}", 1))
            assert await peers.read(replace(LARGE_PART, priority=3), ("z", "a")) is not None
        assert peers.counts()["z"].failures == {"connect_timeout": 2}


async def test_a_broken_peer_is_left_alone_for_a_while() -> None:
    """The second read goes straight to the next owner, and that is counted too; a peer that only lacks a block is not
    left alone."""
    async with peers_of(cut, right) as (peers, served):
        for _ in range(2):
            assert await peers.read(LARGE_PART, ("a", "b")) is not None
        assert served[0].struck == 1
        assert peers.counts()["a"].skipped == 1
    async with peers_of(fail, right) as (peers, served):
        for _ in range(2):
            assert await peers.read(LARGE_PART, ("a", "b")) is not None
        assert [peer.struck for peer in served] == [2, 2]


async def test_nobody_who_gives_it_is_none() -> None:
    """The caller goes to the store."""
    async with peers_of(lie, fail) as (peers, served):
        assert await peers.read(SMALL_PART, ("a", "b", "unknown")) is None
        assert [peer.struck for peer in served] == [1, 1]


async def test_a_peer_that_says_it_is_at_work_is_waited_for() -> None:
    """A slow store behind an owner is no dead owner: interim answers and frames count as progress."""
    pauses = 6

    async def slowly(writer: Writer, is_small: bool) -> None:
        working = Frame(bytes(16), 0, 0, 0, WORKING, 0).pack()
        if is_small:
            writer.write(stream_of(working))
        for _ in range(pauses):
            never: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            await asyncio.wait({never}, timeout=STALL_S / 2)
            writer.write(b"%x\r\n%b\r\n" % (len(working), working) if is_small else b"HTTP/1.1 102 -\r\n\r\n")
        if is_small:
            frame = Frame(bytes.fromhex(SMALL_PART.digest), 0, len(SMALL), crc32c.crc32c(SMALL), OK, 0).pack() + SMALL
            writer.write(b"%x\r\n%b\r\n0\r\n\r\n" % (len(frame), frame))
        else:
            writer.write(large_answer(DATA))

    async with peers_of(slowly) as (peers, _):
        assert await peers.read(SMALL_PART, ("a",)) == SMALL
        assert await peers.read(LARGE_PART, ("a",)) is not None
        assert peers.counts()["a"].failures == {}


async def test_a_peer_that_sends_little_at_a_time_is_waited_for() -> None:
    """Bytes are progress, however few of them come within the stall timeout."""

    async def drip(writer: Writer, is_small: bool) -> None:
        never: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        whole = large_answer(DATA)
        for at in range(0, len(whole), len(whole) // 5):
            writer.write(whole[at : at + len(whole) // 5])
            await asyncio.wait({never}, timeout=STALL_S / 2)

    async with peers_of(drip) as (peers, _):
        data = await peers.read(replace(LARGE_PART, priority=3), ("a",))
        assert data is not None
        assert bytes(data) == DATA
        assert peers.counts()["a"].failures == {}


async def test_what_is_asked_for_at_one_moment_goes_in_one_batch() -> None:
    """Many small objects cost one request; each caller gets its own bytes."""
    names = [ObjectId("s", f"k{number}", "v") for number in range(50)]
    parts = [
        ExtentPart(name, name.digest(), number + 1, 0, ByteRange(0, number + 1)) for number, name in enumerate(names)
    ]

    async def in_another_order(writer: Writer, is_small: bool) -> None:
        frames = b""
        for index in reversed(range(50)):
            data = bytes([index]) * (index + 1)
            frames += (
                Frame(bytes.fromhex(parts[index].digest), 0, len(data), crc32c.crc32c(data), OK, index).pack() + data
            )
        writer.write(stream_of(frames) + b"0\r\n\r\n")

    async with peers_of(in_another_order) as (peers, served):
        found = await asyncio.gather(*(peers.read(part, ("a",)) for part in parts))
        assert found == [bytes([index]) * (index + 1) for index in range(50)]
        assert served[0].struck == 1


@pytest.mark.parametrize("part", [LARGE_PART, SMALL_PART], ids=["large", "small"])
async def test_a_slow_owner_is_hedged_by_the_next_one(part: ExtentPart) -> None:
    """The first owner never answers; the second gives what it holds. The first is found out all the same, by its
    timeout, and left alone."""
    async with peers_of(hang, right) as (peers, served):
        assert await peers.read(part, ("a", "b")) is not None
        assert [peer.struck for peer in served] == [1, 1]
        assert (peers.counts()["a"].hedged, peers.counts()["b"].requests) == (1, 1)
        never: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        while not peers.counts()["a"].failures:
            await asyncio.wait({never}, timeout=STALL_S / 4)
        assert peers.counts()["a"].failures == {"no_progress": 1}
