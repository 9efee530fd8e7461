"""Small objects of one node, many in a request: who waits for one waits for the batch that it went into.

Owns: gathering what is asked for at one moment, a bounded number of batches under way, reading the stream. Leaves to
others: what the bytes on the wire are (peer_blocks), the causes' consequences (peers).

Nothing waits to be gathered: what is asked for in one turn of the loop goes together, and while as many batches are
under way as may be, the rest gathers, the most urgent first.
"""

from __future__ import annotations

import asyncio
import heapq
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import crc32c

from orchestra.cluster.peer_blocks import (
    BATCH_BYTES_MAX,
    BATCH_COUNT_MAX,
    BLOCKS,
    FRAME_HEAD_BYTES,
    OK,
    WORKING,
    Frame,
    encode_blocks,
    unpack_frame,
)
from orchestra.cluster.peer_wire import WORKING_MAX_S, Cause, ExtentPart, PeerError, cause_of

# Batches under way to one node. A batch that waits for a store holds its place, so what a reader waits for has more.
BATCHES_MAX = 8
DEMAND_BATCHES_MAX = 16
_HEAD_BYTES_MAX = 16 * 1024
_BUFFER_BYTES = 512 * 1024
_LINE_BYTES_MAX = 64
_CHUNK_BYTES_MAX = BATCH_BYTES_MAX + BATCH_COUNT_MAX * FRAME_HEAD_BYTES
# How often a stall timeout is looked at.
_STALL_LOOKS = 4

Prove = Callable[[str, str, str, bytes], Mapping[str, str]]
# Told who else holds a part, by places in the ring's order.
Heard = Callable[[ExtentPart, int], None]


@dataclass(order=True, slots=True)
class _Asked:
    priority: int
    serial: int
    part: ExtentPart = field(compare=False)
    answer: asyncio.Future[bytes] = field(compare=False)


class BatchClient:
    """Asks one node for small objects. One event loop; connects to nothing before its first request."""

    def __init__(
        self,
        address: str,
        host: str,
        port: int,
        prove: Prove,
        *,
        connect_timeout_s: float,
        stall_timeout_s: float,
        heard: Heard,
    ) -> None:
        self._heard = heard
        self._address = address
        self._host = host
        self._port = port
        self._prove = prove
        self._connect_timeout_s = connect_timeout_s
        self._stall_timeout_s = stall_timeout_s
        self._waiting: list[_Asked] = []
        self._serials = itertools.count()
        self._idle: list[_Stream] = []
        self._running: set[asyncio.Task[None]] = set()
        self._is_due = False
        self.batches = 0  # sent since the start

    async def fetch(self, part: ExtentPart) -> bytes:
        """Return that whole small object, its checksum compared. Raises PeerError."""
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[bytes] = loop.create_future()
        heapq.heappush(self._waiting, _Asked(part.priority, next(self._serials), part, answer))
        if not self._is_due:
            self._is_due = True
            loop.call_soon(self._send)
        return await answer

    def close_idle(self) -> None:
        """Close idle connections; those in use close when their batches end."""
        while self._idle:
            self._idle.pop().abort()

    def _send(self) -> None:
        self._is_due = False
        while self._waiting:
            limit = BATCHES_MAX if self._waiting[0].priority else DEMAND_BATCHES_MAX
            if len(self._running) >= limit:
                return
            batch = self._gather()
            if batch:
                self.batches += 1
                task = asyncio.create_task(self._run(batch))
                self._running.add(task)
                task.add_done_callback(self._ended)

    def _gather(self) -> list[_Asked]:
        batch: list[_Asked] = []
        size_bytes = 0
        while self._waiting and len(batch) < BATCH_COUNT_MAX:
            first = self._waiting[0]
            if first.answer.done():  # who asked went away
                heapq.heappop(self._waiting)
                continue
            if batch and (
                size_bytes + first.part.size_bytes > BATCH_BYTES_MAX
                or first.part.held_only is not batch[0].part.held_only
            ):
                break
            size_bytes += first.part.size_bytes
            batch.append(heapq.heappop(self._waiting))
        return batch

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._running.discard(task)
        self._send()

    async def _run(self, batch: Sequence[_Asked]) -> None:
        try:
            await self._exchange(batch)
        except PeerError as error:
            for asked in batch:
                if not asked.answer.done():
                    asked.answer.set_exception(PeerError(error.cause, str(error)))
        finally:  # cancelled with the loop
            for asked in batch:
                if not asked.answer.done():
                    asked.answer.cancel()

    async def _exchange(self, batch: Sequence[_Asked]) -> None:
        body = encode_blocks([asked.part for asked in batch])
        while self._idle:
            stream = self._idle.pop()
            if stream.is_usable:
                try:
                    await self._over(stream, body, batch)
                    return
                except _IdleClosedError:
                    continue  # it was idle too long; the request did not reach anybody
        try:
            await self._over(await self._connect(), body, batch)
        except _IdleClosedError as error:
            raise PeerError(Cause.CUT_SHORT, "the connection was closed without an answer") from error

    async def _over(self, stream: _Stream, body: bytes, batch: Sequence[_Asked]) -> None:
        lines = [f"POST {BLOCKS} HTTP/1.1", f"host: {self._address}", f"content-length: {len(body)}"]
        lines += [f"{name}: {value}" for name, value in self._prove("POST", BLOCKS, "", body).items()]
        try:
            await stream.exchange("\r\n".join((*lines, "", "")).encode("latin-1") + body, batch, self._stall_timeout_s)
        except BaseException:
            stream.abort()
            raise
        if stream.is_usable:
            self._idle.append(stream)

    async def _connect(self) -> _Stream:
        try:
            async with asyncio.timeout(self._connect_timeout_s):
                _, stream = await asyncio.get_running_loop().create_connection(
                    partial(_Stream, self._heard), self._host, self._port
                )
        except TimeoutError as error:
            raise PeerError(Cause.CONNECT_TIMEOUT, f"no connection within {self._connect_timeout_s:g}s") from error
        except OSError as error:
            raise PeerError(Cause.CONNECT_REFUSED, str(error)) from error
        return stream


class _IdleClosedError(Exception):
    """The connection ended before the first byte of the answer."""


class _Stream(asyncio.BufferedProtocol):
    """One connection, one batch at a time: the head, then chunks of whole frames."""

    def __init__(self, heard: Heard) -> None:
        self._heard = heard
        self._transport: asyncio.Transport | None = None
        self._buffer = bytearray(_BUFFER_BYTES)
        self._view = memoryview(self._buffer)
        self._length = 0  # bytes in the buffer
        self._at = 0  # those of them that were read
        self._chunk_left = -1  # bytes of the chunk; -1: the head comes first
        self._frame: Frame | None = None
        self._batch: Sequence[_Asked] = ()
        self._left: set[int] = set()
        self._done: asyncio.Future[None] | None = None
        self._progress = 0
        self._body = bytearray()

    @property
    def is_usable(self) -> bool:
        """Whether another batch may be sent."""
        return self._transport is not None and not self._transport.is_closing()

    async def exchange(self, request: bytes, batch: Sequence[_Asked], stall_timeout_s: float) -> None:
        """Send and read the whole answer; each object goes to who waits for it at once. Raises PeerError."""
        if self._transport is None:
            raise _IdleClosedError
        loop = asyncio.get_running_loop()
        self._length = self._at = self._progress = 0
        self._chunk_left = -1
        self._frame = None
        self._batch, self._left = batch, set(range(len(batch)))
        self._done = loop.create_future()
        self._transport.write(request)
        try:
            await self._wait(self._done, stall_timeout_s)
        finally:
            self._done, self._batch = None, ()

    async def _wait(self, done: asyncio.Future[None], stall_timeout_s: float) -> None:
        seen, quiet_looks = -1, 0
        interval_s = stall_timeout_s / _STALL_LOOKS
        for _ in range(int(WORKING_MAX_S / interval_s)):
            if (await asyncio.wait({done}, timeout=interval_s))[0]:
                return done.result()
            quiet_looks = 0 if self._progress != seen else quiet_looks + 1
            seen = self._progress
            if quiet_looks >= _STALL_LOOKS:
                raise PeerError(Cause.NO_PROGRESS, f"no byte for {stall_timeout_s:g}s")
        raise PeerError(Cause.NO_PROGRESS, f"not done within {WORKING_MAX_S:g}s")

    def abort(self) -> None:
        """Close at once."""
        if self._transport is not None:
            self._transport.abort()
            self._transport = None

    # -- called by the loop ----------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """See asyncio.BaseProtocol."""
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def get_buffer(self, sizehint: int) -> memoryview:
        """See asyncio.BufferedProtocol."""
        if self._at == self._length:
            self._at = self._length = 0
        elif self._length == len(self._buffer):
            rest = self._length - self._at
            self._buffer[:rest] = self._buffer[self._at : self._length]
            self._at, self._length = 0, rest
        return self._view[self._length :]

    def buffer_updated(self, nbytes: int) -> None:
        """See asyncio.BufferedProtocol."""
        self._progress += 1
        if self._done is None or self._done.done():
            self.abort()  # bytes that nobody asked for
            return
        self._length += nbytes
        try:
            while self._read_one():
                pass
        except (PeerError, ValueError) as error:
            known = error if isinstance(error, PeerError) else PeerError(Cause.UNREADABLE, str(error))
            self._done.set_exception(known)
            self.abort()

    def eof_received(self) -> bool:
        """See asyncio.Protocol."""
        return False

    def connection_lost(self, exc: Exception | None) -> None:
        """See asyncio.BaseProtocol."""
        self._transport = None
        if self._done is not None and not self._done.done():
            is_unanswered = not self._progress
            error = _IdleClosedError() if is_unanswered else PeerError(Cause.CUT_SHORT, "the answer was cut short")
            self._done.set_exception(error)

    # -- the stream ------------------------------------------------------------------------------------------------

    def _read_one(self) -> bool:
        """Read the next piece, if it is here whole. Raises PeerError, ValueError."""
        if self._chunk_left < 0:
            return self._read_head()
        if self._frame is not None:
            return self._read_body(self._frame)
        if not self._chunk_left:
            return self._read_chunk_size()
        if self._length - self._at < FRAME_HEAD_BYTES:
            return False
        self._begin_frame(unpack_frame(self._buffer, self._at))
        return True

    def _read_head(self) -> bool:
        end = self._buffer.find(b"\r\n\r\n", self._at, self._length)
        if end < 0:
            if self._length - self._at > _HEAD_BYTES_MAX:
                raise PeerError(Cause.UNREADABLE, "the head of the answer is too long")
            return False
        head = self._buffer[self._at : end].decode("latin-1").lower()
        status = int(head[9:12])
        if status != OK:
            raise PeerError(cause_of(status), f"status {status}")
        if "transfer-encoding: chunked" not in head:
            raise PeerError(Cause.UNREADABLE, "the answer is no stream")
        self._at = end + 4
        self._chunk_left = 0
        return True

    def _read_chunk_size(self) -> bool:
        end = self._buffer.find(b"\r\n", self._at + 2, self._length)  # past the end of the chunk before
        if end < 0:
            if self._length - self._at > _LINE_BYTES_MAX:
                raise PeerError(Cause.UNREADABLE, "a line that is no chunk's size")
            return False
        size = int(self._buffer[self._at : end], 16)
        if not size:
            return self._read_end(end + 2)
        if not 0 < size <= _CHUNK_BYTES_MAX:
            raise PeerError(Cause.UNREADABLE, f"a chunk of {size} bytes")
        self._at, self._chunk_left = end + 2, size
        return True

    def _read_end(self, at: int) -> bool:
        if self._length < at + 2:
            return False
        assert self._done is not None
        if self._left or self._length != at + 2:
            raise PeerError(Cause.UNREADABLE, f"the answer ended without {len(self._left)} of its objects")
        self._at = self._length
        self._done.set_result(None)
        return False

    def _begin_frame(self, frame: Frame) -> None:
        if frame.length + FRAME_HEAD_BYTES > self._chunk_left:
            raise PeerError(Cause.UNREADABLE, "an object that does not fit its chunk")
        if frame.status != WORKING:
            if frame.index not in self._left:
                raise PeerError(Cause.UNREADABLE, "an object that was not asked for")
            part = self._batch[frame.index].part
            wanted = part.size_bytes if frame.status == OK else 0
            if frame.length != wanted or frame.digest.hex() != part.digest:
                raise PeerError(Cause.UNREADABLE, "another object than was asked for")
        elif frame.length:
            raise PeerError(Cause.UNREADABLE, "a sign of work with bytes")
        self._at += FRAME_HEAD_BYTES
        self._chunk_left -= FRAME_HEAD_BYTES
        self._frame = frame
        self._body = bytearray()

    def _read_body(self, frame: Frame) -> bool:
        missing = frame.length - len(self._body)
        take = min(missing, self._length - self._at)
        if take == frame.length:  # all of it is here
            data = bytes(self._view[self._at : self._at + take])
        else:
            self._body += self._view[self._at : self._at + take]
            data = bytes(self._body) if take == missing else b""
        self._at += take
        self._chunk_left -= take
        if take < missing:
            return False
        self._frame = None
        self._give(frame, data)
        return True

    def _give(self, frame: Frame, data: bytes) -> None:
        if frame.status == WORKING:
            return
        self._left.discard(frame.index)
        asked = self._batch[frame.index]
        answer = asked.answer
        if answer.done():
            return
        if frame.status != OK:
            answer.set_exception(PeerError(cause_of(frame.status), f"status {frame.status}"))
        elif crc32c.crc32c(data) != frame.checksum:
            answer.set_exception(PeerError(Cause.CHECKSUM, "the bytes are not the object's"))
        else:
            if frame.places:
                self._heard(asked.part, frame.places)
            answer.set_result(data)
