"""POST /v1/peer/blocks: many small objects for another node, in one stream, each as soon as it is ready.

Owns: the order of work, the frames. Leaves to others: the connection (peer), what is held and how it is brought
(daemon.peers).
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence

import crc32c

from orchestra.cluster.peer_blocks import OK, WORKING, Frame
from orchestra.cluster.peer_wire import Cause, ExtentPart, PeerError, status_of
from orchestra.daemon.peers import PeerService

HEAD = b"HTTP/1.1 200 -\r\nContent-Type: application/octet-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
END = b"0\r\n\r\n"
# What is gathered before it is handed to the connection.
_CHUNK_BYTES = 256 * 1024
_WORKING = Frame(bytes(16), 0, 0, 0, WORKING, 0).pack()

# Takes bytes, and returns when there is room for more.
Write = Callable[[Sequence[bytes]], Awaitable[None]]


async def answer_batch(service: PeerService, parts: Sequence[ExtentPart], write: Write, working_every_s: float) -> None:
    """Answer with every part. What is here goes first; what is not is fetched meanwhile."""
    answer = _Answer(parts, write, service.places_of)
    held: list[int] = []
    bringing: dict[asyncio.Task[bytes], int] = {}
    try:
        for index, part in enumerate(parts):
            try:
                if service.may_hold(part):
                    held.append(index)
                elif part.held_only:
                    answer.refuse(index, Cause.NOT_HELD)
                else:
                    bringing[asyncio.create_task(service.bring_small(part))] = index
            except PeerError as error:
                answer.refuse(index, error.cause)
        for index, data in zip(held, await service.read_held([parts[index] for index in held]), strict=True):
            if data is not None:
                await answer.give(index, data)
            elif parts[index].held_only:
                answer.refuse(index, Cause.NOT_HELD)
            else:  # of another boot, or evicted meanwhile
                bringing[asyncio.create_task(service.bring_small(parts[index]))] = index
        await answer.flush()
        while bringing:
            done, _ = await asyncio.wait(bringing, timeout=working_every_s, return_when=asyncio.FIRST_COMPLETED)
            if not done:
                answer.work()
            for task in done:
                await answer.take(bringing.pop(task), task)
            await answer.flush()
        await write((END,))
    finally:
        for task in bringing:  # the peer went away; fetches go on: others may wait for them
            task.cancel()


class _Answer:
    """Gathers frames into chunks."""

    def __init__(self, parts: Sequence[ExtentPart], write: Write, places_of: Callable[[ExtentPart], int]) -> None:
        self._parts = parts
        self._places_of = places_of
        self._write = write
        self._pieces: list[bytes] = []
        self._length = 0

    async def give(self, index: int, data: bytes) -> None:
        """Answer with these bytes; wait if the peer takes them slowly."""
        self._add(index, OK, crc32c.crc32c(data), data)
        if self._length >= _CHUNK_BYTES:
            await self.flush()

    async def take(self, index: int, task: asyncio.Task[bytes]) -> None:
        """Answer with what a task brought, or why it brought nothing."""
        try:
            data = task.result()
        except PeerError as error:
            self.refuse(index, error.cause)
            return
        await self.give(index, data)

    def refuse(self, index: int, cause: Cause) -> None:
        """Answer without bytes."""
        self._add(index, status_of(cause), 0, b"")

    def work(self) -> None:
        """Say that something is still being fetched."""
        self._pieces.append(_WORKING)
        self._length += len(_WORKING)

    def _add(self, index: int, status: int, checksum: int, data: bytes) -> None:
        part = self._parts[index]
        places = self._places_of(part) if status == OK else 0
        head = Frame(bytes.fromhex(part.digest), places, len(data), checksum, status, index).pack()
        self._pieces += (head, data)
        self._length += len(head) + len(data)

    async def flush(self) -> None:
        """Hand over what was gathered."""
        if self._length:
            pieces = [b"%x\r\n" % self._length, *self._pieces, b"\r\n"]
            self._pieces, self._length = [], 0
            await self._write(pieces)
