"""GET of a byte range over HTTP/1.1, straight into its buffer: the hot path of fetching.

Owns: connections and the least of HTTP that a range needs. Leaves to others: URLs and signatures (s3_wire), what a
version is, anything that is not a plain 206 with its length (http_client asks again and explains).

Why it exists, measured on one loop with 64 requests in flight (110 kB each, 2 cores): obstore hands every answer to
the loop from a thread of its own, and while the loop also writes files those threads and the loop fight for the
interpreter lock: 1,040 us of CPU a file against 370 us here (docs/decisions/0002-range-client.md). There is no thread
here, no copy between the socket and the buffer that is written to disk, and nothing that a fork could break.
"""

from __future__ import annotations

import asyncio
import ssl
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from urllib.parse import urlsplit

from multidict import CIMultiDict

from orchestra.errors import StoreUnavailableError
from orchestra.values import ByteRange

_HEAD_BYTES_MAX = 64 * 1024
# Received together with a small body, which then stays where it is. S3's heads have 400 to 700 bytes; behind a longer
# one the body is received elsewhere.
_HEAD_ROOM_BYTES = 2 * 1024
# An error's XML; more is no error that we could name.
_ERROR_BODY_BYTES_MAX = 64 * 1024
_CONNECT_TIMEOUT_S = 10.0
# How often a stall timeout is looked at: a connection without a byte is given up after 1 to 1.25 times that.
_STALL_LOOKS = 4
# Bodies from this size on are received into memory that was used before; so much of it is kept while requests go on:
# more than the 32 blocks of 4 MiB that may be in flight, else each takes the place of one that is still in use.
_KEPT_BYTES_MIN = 1024 * 1024
_KEPT_MAX = 36
# The list of kept ones, the loop's variable, and the argument of getrefcount itself.
_REFERENCES_WHEN_FREE = 3
# Idle connections kept per store; the limiter bounds those in use.
_IDLE_MAX = 256


@dataclass(frozen=True, slots=True)
class RangeAnswer:
    """A whole answer. `data` is the body."""

    status: int
    headers: CIMultiDict[str]
    data: memoryview


class NotPlainError(Exception):
    """The answer is not one that this client reads (chunked, without a length, a whole body for a range)."""


class ConnectionClosedError(Exception):
    """The connection ended before the first byte of the answer: an idle one that the server had given up."""


# Called with a whole answer, or with what came instead.
Ended = Callable[[RangeAnswer | BaseException], None]


def _settle(done: asyncio.Future[RangeAnswer], outcome: RangeAnswer | BaseException) -> None:
    if done.done():  # cancelled
        return
    if isinstance(outcome, BaseException):
        done.set_exception(outcome)
    else:
        done.set_result(outcome)


class RangeClient:
    """Connections to one server. One event loop; opens nothing before its first request."""

    def __init__(self, base_url: str, *, ssl_context: ssl.SSLContext | None, stall_timeout_s: float) -> None:
        parts = urlsplit(base_url)
        self._host = parts.hostname or ""
        self._port = parts.port or (443 if parts.scheme == "https" else 80)
        self._ssl = ssl_context if parts.scheme == "https" else None
        self._stall_timeout_s = stall_timeout_s
        self._idle: list[_Connection] = []
        self._is_closed = False
        self._busy: set[_Connection] = set()
        self._buffers = Buffers()
        self._timer: asyncio.TimerHandle | None = None

    async def get(self, target: str, headers: Mapping[str, str], wanted: ByteRange) -> RangeAnswer:
        """Send one GET; return the answer with its whole body.

        Raises NotPlainError, OSError (TimeoutError among them), ssl.SSLError, StoreUnavailableError for a body cut
        short. After an error or a cancellation the connection is closed and nobody writes into its buffer any more.
        """
        return await self.send(request_of(target, headers), wanted)

    async def send(self, request: bytes, wanted: ByteRange) -> RangeAnswer:
        """As `get`, of a request as it goes out."""
        while (connection := self._take_idle()) is not None:
            try:
                return await self._exchange(connection, request, wanted)
            except ConnectionClosedError:
                continue  # it was idle too long; the request did not reach anybody
        try:
            return await self._exchange(await self._connect(), request, wanted)
        except ConnectionClosedError as error:
            raise ConnectionResetError("the server closed the connection without an answer") from error

    def send_soon(self, request: bytes, wanted: ByteRange, ended: Ended) -> Callable[[], object]:
        """As `send`, without a task where a connection is idle: call `ended`, later, with the answer or with what
        `send` would raise. Returns what takes the request back; `ended` is then not called any more."""
        sending = _Sending(self, request, wanted, ended)
        sending.begin(self._take_idle())
        return sending.take_back

    async def close(self) -> None:
        """As `close_idle`."""
        self.close_idle()

    def close_idle(self) -> None:
        """Close idle connections; those in use close when their requests end."""
        self._is_closed = True
        if self._timer is not None and not self._busy:  # those in use may still stall
            self._timer.cancel()
            self._timer = None
        while self._idle:
            self._idle.pop().abort()

    async def _exchange(self, connection: _Connection, request: bytes, wanted: ByteRange) -> RangeAnswer:
        done: asyncio.Future[RangeAnswer] = asyncio.get_running_loop().create_future()
        is_well = False
        try:
            self.begin_on(connection, request, wanted, partial(_settle, done))
            answer = await done
            is_well = True
        finally:
            self.end_on(connection, is_well=is_well)
        return answer

    def begin_on(self, connection: _Connection, request: bytes, wanted: ByteRange, ended: Ended) -> None:
        """Send a request on it, and look for stalls until `end_on`. Raises ConnectionClosedError."""
        self._busy.add(connection)
        if self._timer is None:
            self._look_later()
        connection.begin(request, wanted.length, ended)

    def end_on(self, connection: _Connection, *, is_well: bool) -> None:
        """Nothing is under way on it any more."""
        self._busy.discard(connection)
        if is_well and connection.is_usable and not self._is_closed and len(self._idle) < _IDLE_MAX:
            self._idle.append(connection)
        else:
            connection.abort()

    def _take_idle(self) -> _Connection | None:
        while self._idle:
            connection = self._idle.pop()
            if connection.is_usable:
                return connection
        return None

    def _look_later(self) -> None:
        """One timer for all connections: nearly every request is over before any would have run out."""
        interval_s = self._stall_timeout_s / _STALL_LOOKS
        self._timer = asyncio.get_running_loop().call_later(interval_s, self._look_for_stalls)

    def _look_for_stalls(self) -> None:
        self._timer = None
        for connection in list(self._busy):
            connection.fail_if_stalled(self._stall_timeout_s)
        if not self._busy:
            self._buffers.clear()
        elif self._timer is None:  # else who was told of a stall has sent again, and looks already
            self._look_later()

    async def _connect(self) -> _Connection:
        loop = asyncio.get_running_loop()
        async with asyncio.timeout(min(_CONNECT_TIMEOUT_S, self._stall_timeout_s)):
            _, connection = await loop.create_connection(
                partial(_Connection, self._buffers),
                self._host,
                self._port,
                ssl=self._ssl,
                server_hostname=self._host if self._ssl is not None else None,
            )
        return connection


class _Sending:
    """A request that `send_soon` sent: on a connection that was idle, else (also if that had ended) in a task."""

    __slots__ = ("_client", "_connection", "_ended", "_is_taken_back", "_request", "_task", "_wanted")

    def __init__(self, client: RangeClient, request: bytes, wanted: ByteRange, ended: Ended) -> None:
        self._client = client
        self._request = request
        self._wanted = wanted
        self._ended = ended
        self._connection: _Connection | None = None
        self._task: asyncio.Task[RangeAnswer] | None = None
        self._is_taken_back = False

    def begin(self, connection: _Connection | None) -> None:
        """Send it."""
        if connection is None:
            self._task = asyncio.get_running_loop().create_task(self._client.send(self._request, self._wanted))
            self._task.add_done_callback(self._tell)
        else:
            self._connection = connection
            self._client.begin_on(connection, self._request, self._wanted, self._answered)

    def take_back(self) -> None:
        """See RangeClient.send_soon."""
        self._is_taken_back = True
        if self._task is not None:
            self._task.cancel()
        elif self._connection is not None:
            self._client.end_on(self._connection, is_well=False)

    def _answered(self, outcome: RangeAnswer | BaseException) -> None:
        assert self._connection is not None, "it came on one"
        self._client.end_on(self._connection, is_well=isinstance(outcome, RangeAnswer))
        if isinstance(outcome, ConnectionClosedError):  # it was idle too long; the request did not reach anybody
            self.begin(None)
        else:
            self._ended(outcome)

    def _tell(self, task: asyncio.Task[RangeAnswer]) -> None:
        if task.cancelled():
            return
        outcome = task.exception() or task.result()
        if not self._is_taken_back:  # else it was over, and about to be told of
            self._ended(outcome)


def request_of(target: str, headers: Mapping[str, str]) -> bytes:
    """Return the GET as it goes out."""
    lines = "".join([f"{name}: {value}\r\n" for name, value in headers.items()])
    return f"GET {target} HTTP/1.1\r\n{lines}accept-encoding: identity\r\n\r\n".encode("latin-1")


def ssl_setting_of(ca_file: str, *, allow_invalid: bool) -> ssl.SSLContext | bool:
    """Return whom to trust, as aiohttp takes it: False trusts anybody, True is the system's default. Raises OSError and
    ssl.SSLError for a file that holds no certificates."""
    if allow_invalid or not ca_file:
        return not allow_invalid
    context = ssl.create_default_context()
    context.load_verify_locations(cafile=ca_file)
    return context


def ssl_context_of(setting: ssl.SSLContext | bool) -> ssl.SSLContext:
    """Return what aiohttp makes of the same setting."""
    if isinstance(setting, ssl.SSLContext):
        return setting
    context = ssl.create_default_context()
    if not setting:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    return context


class Buffers:
    """Bodies of whole blocks, used again: fresh memory of 4 MiB costs a page fault for every 4 KiB of it.

    A buffer is free when nobody but this list refers to it, so nobody has to say that he is done with one.
    """

    def __init__(self) -> None:
        self._kept: list[bytearray] = []

    def take(self, size_bytes: int) -> bytearray:
        """Return a buffer of that size, with anything in it."""
        if size_bytes < _KEPT_BYTES_MIN:
            return bytearray(size_bytes)
        for buffer in self._kept:
            if sys.getrefcount(buffer) == _REFERENCES_WHEN_FREE and len(buffer) == size_bytes:
                return buffer
        fresh = bytearray(size_bytes)
        if len(self._kept) >= _KEPT_MAX:
            self._kept.pop(0)  # whoever still uses it keeps it alive
        self._kept.append(fresh)
        return fresh

    def clear(self) -> None:
        """Give the memory back."""
        self._kept.clear()


class _Connection(asyncio.BufferedProtocol):
    """One connection, one request at a time. The body is received where it stays."""

    def __init__(self, buffers: Buffers) -> None:
        self._buffers = buffers
        self._transport: asyncio.Transport | None = None
        self._loop = asyncio.get_running_loop()
        self._head = bytearray()  # the head of an answer, and its body if that is small
        self._head_length = 0
        self._body: memoryview | None = None
        self._body_length = 0
        self._status = 0
        self._headers: CIMultiDict[str] = CIMultiDict()
        self._wanted = 0
        self._keep_alive = True
        self._ended: Ended | None = None  # while an answer is waited for
        self._looks = 0
        self._progress = 0
        self._seen_progress = 0

    @property
    def is_usable(self) -> bool:
        """Whether another request may be sent."""
        return self._transport is not None and self._keep_alive and not self._transport.is_closing()

    def begin(self, request: bytes, wanted: int, ended: Ended) -> None:
        """Send, and call `ended` when the whole answer is here, or never will be. Raises ConnectionClosedError."""
        if self._transport is None:
            raise ConnectionClosedError
        self._head_length = self._body_length = self._status = 0
        self._body = None
        self._wanted = wanted
        self._head = bytearray(_HEAD_ROOM_BYTES + (wanted if wanted < _KEPT_BYTES_MIN else 0))
        self._ended = ended
        self._seen_progress = self._progress
        self._looks = -1  # the first look comes too early for this request
        self._transport.write(request)

    def _end(self, outcome: RangeAnswer | BaseException) -> None:
        ended, self._ended = self._ended, None
        self._forget()
        if ended is not None:
            ended(outcome)

    def _forget(self) -> None:
        """Whatever still comes must not be written behind the body."""
        self._body, self._head, self._head_length = None, bytearray(), 0

    def abort(self) -> None:
        """Close at once; nothing is received any more, and nothing is said of the answer."""
        self._keep_alive = False
        self._ended = None
        self._forget()
        if self._transport is not None:
            self._transport.abort()
            self._transport = None

    # -- called by the loop ----------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """See asyncio.BaseProtocol."""
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def get_buffer(self, sizehint: int) -> memoryview:
        """See asyncio.BufferedProtocol: the body goes where it stays. A small one may come with its head at once, which
        spares a system call and a turn of the loop for every file."""
        if self._body is not None:
            return self._body[self._body_length :]
        if self._head_length == len(self._head):
            self._head.extend(bytes(max(_HEAD_ROOM_BYTES, len(self._head))))
        return memoryview(self._head)[self._head_length :]

    def buffer_updated(self, nbytes: int) -> None:
        """See asyncio.BufferedProtocol."""
        self._progress += 1
        if self._ended is None:
            self.abort()  # bytes that nobody asked for
            return
        if self._body is not None:
            self._body_length += nbytes
        else:
            self._head_length += nbytes
            end = self._head.find(b"\r\n\r\n", 0, self._head_length)
            if end < 0:
                if self._head_length >= _HEAD_BYTES_MAX:
                    self._fail(NotPlainError("the head of the answer is too long"))
                return
            try:
                self._begin_body(end)
            except (NotPlainError, ValueError) as error:
                self._fail(error if isinstance(error, NotPlainError) else NotPlainError(str(error)))
                return
        assert self._body is not None
        if self._body_length == len(self._body):
            self._end(RangeAnswer(self._status, self._headers, self._body))

    def eof_received(self) -> bool:
        """See asyncio.Protocol."""
        return False

    def connection_lost(self, exc: Exception | None) -> None:
        """See asyncio.BaseProtocol."""
        self._transport = None
        self._keep_alive = False
        if self._body is not None:
            text = f"the body ended after {self._body_length} of {len(self._body)} bytes"
            self._end(StoreUnavailableError(text))
        elif not self._head_length:
            self._end(ConnectionClosedError())
        else:
            self._end(exc or ConnectionResetError("the server cut its answer short"))

    def _begin_body(self, end: int) -> None:
        """Read the head; make the body's buffer and move what came with the head into it."""
        lines = self._head[:end].decode("latin-1").split("\r\n")
        protocol, _, rest = lines[0].partition(" ")
        self._status = int(rest[:3])
        headers: CIMultiDict[str] = CIMultiDict()
        for line in lines[1:]:
            name, _, value = line.partition(":")
            headers.add(name.strip(), value.strip())
        self._headers = headers
        self._keep_alive = protocol == "HTTP/1.1" and headers.get("connection", "").lower() != "close"
        length = headers.get("content-length", "")
        if "transfer-encoding" in headers or not (length.isascii() and length.isdigit()):
            raise NotPlainError("the answer has no plain length")
        if 200 <= self._status < 300 and self._status != 206:
            raise NotPlainError("a whole body, or none, for a range")
        limit = self._wanted if self._status == 206 else _ERROR_BODY_BYTES_MAX
        if int(length) > limit:
            raise NotPlainError(f"a body of {length} bytes where {limit} were expected")
        self._body_length = self._head_length - (end + 4)
        if self._body_length > int(length):
            raise NotPlainError("more bytes than the answer's length")
        whole = memoryview(self._head)[end + 4 : end + 4 + int(length)]
        if len(whole) < int(length):
            early, whole = whole, memoryview(self._buffers.take(int(length)))
            whole[: self._body_length] = early[: self._body_length]
        self._body = whole

    def _fail(self, error: Exception) -> None:
        self._end(error)
        self.abort()

    def fail_if_stalled(self, stall_timeout_s: float) -> None:
        """Called `_STALL_LOOKS` times in that time: fail if nothing came meanwhile."""
        if self._progress != self._seen_progress:
            self._seen_progress = self._progress
            self._looks = 0
            return
        self._looks += 1
        if self._looks >= _STALL_LOOKS:
            self._fail(TimeoutError(f"no byte for {stall_timeout_s:g}s"))
