"""An HTTP proxy that fails when told to, for what a store's client must survive on the wire.

Owns: one hop between a client and a real server, the script of faults, a log of what was asked, proof that faults
fired. Leaves to others: what the server answers; faults above the client (fault_store.py).

Runs in a thread with a loop of its own, so that a test, its loop and a daemon in another process can all use it.

    with S3Server() as server, FaultProxy(server.endpoint) as proxy:
        store = open_store(StoreSettings("s3://bucket/", server.options_at(proxy.endpoint)), fetch)
        fault = proxy.add(Status(503, retry_after="2"), method="GET", path=r"/a\\.bin", at=1, times=10)
        cut = proxy.add(Cut(), method="GET", at_byte=1000)
        ...
        assert fault.fired == 10
        assert proxy.requests[-1].if_match == '"..."'

Bodies are held in memory: for tests, not for traffic.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from types import TracebackType
from urllib.parse import urlsplit

HEAD_BYTES_MAX = 64 * 1024
START_TIMEOUT_S = 10.0


@dataclass(frozen=True, slots=True)
class Delay:
    """Wait before sending body byte `at_byte` (or the head)."""

    seconds: float


@dataclass(frozen=True, slots=True)
class Stall:
    """Send nothing more from `at_byte` on (or no head), until released or the client hangs up."""


@dataclass(frozen=True, slots=True)
class Cut:
    """Close the connection before body byte `at_byte` (or the head), though more was announced."""


@dataclass(frozen=True, slots=True)
class Flip:
    """Turn over the bits of body byte `at_byte` (the first, if not given)."""


@dataclass(frozen=True, slots=True)
class Status:
    """Answer with this status and an S3 error document, without asking the server."""

    status: int
    code: str = "InjectedFault"
    retry_after: str | None = None


@dataclass(frozen=True, slots=True)
class Header:
    """Replace a header of the answer; None removes it. `Header("ETag", '"other"')`, `Header("Content-Range", ...)`."""

    name: str
    value: str | None


@dataclass(frozen=True, slots=True)
class WholeBody:
    """Forward the request without its Range: the answer is 200 with the whole object, where 206 was asked for."""


@dataclass(frozen=True, slots=True)
class Call:
    """Call this (in the proxy's thread) before the request is forwarded: replaces the object at exactly this moment."""

    function: Callable[[], object]


Action = Delay | Stall | Cut | Flip | Status | Header | WholeBody | Call


@dataclass(frozen=True, slots=True)
class LoggedRequest:
    """What a client asked, and what it was answered (0: nothing yet)."""

    method: str
    path: str  # with the query, as sent
    range: str
    if_match: str
    authorization: str = field(default="", repr=False)
    status: int = 0
    body_bytes: int = 0


class ArmedFault:
    """One entry of the script; `fired` counts the requests it was done to."""

    def __init__(
        self, action: Action, *, method: str, path: str, at: int, times: int | None, at_byte: int | None
    ) -> None:
        self.action = action
        self.at_byte = at_byte
        self.fired = 0
        self._method = re.compile(method)
        self._path = re.compile(path)
        self._at = at
        self._times = times
        self._seen = 0
        self._fired_event = threading.Event()
        self._released = threading.Event()

    def wait_fired(self, timeout_s: float = 10.0) -> None:
        """Block until the fault has been reached once. From a coroutine use `wait_fired_async`."""
        assert self._fired_event.wait(timeout_s), f"the fault {self.action} did not fire within {timeout_s}s"

    async def wait_fired_async(self, timeout_s: float = 10.0) -> None:
        """Wait until the fault has been reached once."""
        await asyncio.to_thread(self.wait_fired, timeout_s)

    def release(self) -> None:
        """End a stall, now and for later requests."""
        self._released.set()

    def is_released(self) -> bool:
        """Whether `release` was called."""
        return self._released.is_set()

    def is_due(self, request: LoggedRequest) -> bool:
        """Count a request that matches; return whether the fault is for it."""
        if not self._method.fullmatch(request.method) or not self._path.search(request.path):
            return False
        self._seen += 1
        return self._seen >= self._at and (self._times is None or self._seen < self._at + self._times)

    def fire(self) -> None:
        """Note that the fault is being done."""
        self.fired += 1
        self._fired_event.set()


class FaultProxy:
    """Listens on loopback and forwards to `upstream` ("http://127.0.0.1:9000").

    Each request gets at most one fault: the first in the script that is due. Those after it do not see (or count) that
    request, so two faults of one time each happen one after the other.
    """

    def __init__(self, upstream: str) -> None:
        parts = urlsplit(upstream)
        self._upstream = (parts.hostname or "", parts.port or 80)
        self._script: list[ArmedFault] = []
        self._log: list[LoggedRequest] = []
        self._lock = threading.Lock()
        self._listening = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve()), name="fault-proxy", daemon=True)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stopped: asyncio.Event | None = None
        self._connections: set[asyncio.Task[None]] = set()
        self.port = 0

    # For tests, from any thread.

    @property
    def endpoint(self) -> str:
        """The URL that clients use instead of the upstream's."""
        return f"http://127.0.0.1:{self.port}"

    @property
    def requests(self) -> list[LoggedRequest]:
        """Everything that was asked so far, in order."""
        with self._lock:
            return list(self._log)

    def forget_requests(self) -> None:
        """Empty the log."""
        with self._lock:
            self._log.clear()

    def add(
        self,
        action: Action,
        *,
        method: str = ".*",
        path: str = "",
        at: int = 1,
        times: int | None = 1,
        at_byte: int | None = None,
    ) -> ArmedFault:
        """Do `action` to `times` requests (None: all) from the `at`-th that match from now on.

        `method` must match whole, `path` (a regular expression) anywhere in the path and query. `at_byte` is where in
        the answer's body Delay, Stall, Cut and Flip come; None is before its head.
        """
        fault = ArmedFault(action, method=method, path=path, at=at, times=times, at_byte=at_byte)
        with self._lock:
            self._script.append(fault)
        return fault

    def reset(self) -> None:
        """Forget script and log: for a proxy that several tests share."""
        with self._lock:
            self._script.clear()
            self._log.clear()

    def start(self) -> None:
        """Listen; returns when connections are accepted."""
        self._thread.start()
        if not self._listening.wait(START_TIMEOUT_S):
            raise RuntimeError("the fault proxy did not start")

    def stop(self) -> None:
        """Close every connection and end the thread. Idempotent."""
        if self._loop is not None and self._stopped is not None and self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._stopped.set)
            self._thread.join()

    def __enter__(self) -> FaultProxy:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    # In the proxy's thread.

    async def _serve(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._stopped = asyncio.Event()
        server = await asyncio.start_server(self._accept, "127.0.0.1", 0, limit=HEAD_BYTES_MAX)
        self.port = server.sockets[0].getsockname()[1]
        self._listening.set()
        await self._stopped.wait()
        server.close()
        for task in list(self._connections):
            task.cancel()
        await asyncio.gather(*self._connections, return_exceptions=True)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._connections.add(task)
        upstream: asyncio.StreamWriter | None = None
        try:
            from_server, upstream = await asyncio.open_connection(*self._upstream, limit=HEAD_BYTES_MAX)
            while await self._exchange(_Hop(reader, writer, from_server, upstream)):
                pass
        except (OSError, EOFError, asyncio.LimitOverrunError, asyncio.CancelledError):
            pass  # either side hung up, or the proxy stops: the connection ends
        finally:
            self._connections.discard(task)
            writer.close()
            if upstream is not None:
                upstream.close()

    async def _exchange(self, hop: _Hop) -> bool:
        """Pass one request on; return whether the connection goes on."""
        head = await _read_head(hop.reader)
        request = _described(head)
        body = await _read_body(hop.reader, head, has_body=True)
        fault, index = self._note(request)
        action = fault.action if fault is not None else None
        if isinstance(action, Status):
            return await self._answer(hop, _status_answer(action), request, index, None)
        if isinstance(action, Call):
            action.function()
        if isinstance(action, WholeBody):
            head = head.without("range")
        hop.upstream.write(head.encode() + body)
        answer_head = await _read_head(hop.from_server)
        has_body = request.method != "HEAD" and answer_head.status not in (204, 304)
        answer = _Answer(answer_head, await _read_body(hop.from_server, answer_head, has_body=has_body))
        if isinstance(action, Header):
            answer = replace(answer, head=answer.head.with_header(action.name, action.value))
        return await self._answer(hop, answer, request, index, fault)

    def _note(self, request: LoggedRequest) -> tuple[ArmedFault | None, int]:
        with self._lock:
            self._log.append(request)
            due = next((fault for fault in self._script if fault.is_due(request)), None)
            if due is not None:
                due.fire()
            return due, len(self._log) - 1

    async def _answer(
        self, hop: _Hop, answer: _Answer, request: LoggedRequest, index: int, fault: ArmedFault | None
    ) -> bool:
        body = answer.body
        with self._lock:
            if index < len(self._log):
                self._log[index] = replace(request, status=answer.head.status, body_bytes=len(body))
        # The length as it is now: chunked bodies come out whole. HEAD keeps the length that it is about.
        head = answer.head.without("transfer-encoding")
        if request.method != "HEAD":
            head = head.with_header("Content-Length", str(len(body)))
        unsent = head.encode()
        at_byte = fault.at_byte if fault is not None else None
        if fault is not None and isinstance(fault.action, Flip):
            at = at_byte or 0
            body = body[:at] + bytes([body[at] ^ 0xFF]) + body[at + 1 :]
        elif fault is not None and isinstance(fault.action, (Delay, Stall, Cut)):
            if at_byte is not None:
                hop.writer.write(unsent + body[:at_byte])
                unsent, body = b"", body[at_byte:]
                await hop.writer.drain()
            if not await _interrupted(hop, fault):
                return False
        hop.writer.write(unsent + body)
        await hop.writer.drain()
        return "close" not in answer.head.header("connection").lower()


@dataclass(frozen=True, slots=True)
class _Hop:
    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter
    from_server: asyncio.StreamReader
    upstream: asyncio.StreamWriter


@dataclass(frozen=True, slots=True)
class _Head:
    first: str
    headers: tuple[tuple[str, str], ...]

    @property
    def status(self) -> int:
        return int(self.first.split(" ", 2)[1])

    def header(self, name: str) -> str:
        return next((value for given, value in self.headers if given.lower() == name.lower()), "")

    def without(self, name: str) -> _Head:
        return replace(self, headers=tuple(pair for pair in self.headers if pair[0].lower() != name.lower()))

    def with_header(self, name: str, value: str | None) -> _Head:
        rest = self.without(name)
        return rest if value is None else replace(rest, headers=(*rest.headers, (name, value)))

    def encode(self) -> bytes:
        lines = [self.first, *(f"{name}: {value}" for name, value in self.headers)]
        return ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1")


@dataclass(frozen=True, slots=True)
class _Answer:
    head: _Head
    body: bytes


async def _read_head(reader: asyncio.StreamReader) -> _Head:
    text = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
    first, *lines = text.rstrip("\r\n").split("\r\n")
    pairs = (line.partition(":") for line in lines)
    return _Head(first, tuple((name.strip(), value.strip()) for name, _, value in pairs))


async def _read_body(reader: asyncio.StreamReader, head: _Head, *, has_body: bool) -> bytes:
    if not has_body:
        return b""
    if "chunked" in head.header("transfer-encoding").lower():
        parts = []
        while length := int((await reader.readuntil(b"\r\n")).split(b";")[0], 16):
            parts.append(await reader.readexactly(length))
            await reader.readexactly(2)
        await reader.readuntil(b"\r\n")
        return b"".join(parts)
    length_text = head.header("content-length")
    if length_text:
        return await reader.readexactly(int(length_text))
    return await reader.read() if head.first.startswith("HTTP/") else b""


def _described(head: _Head) -> LoggedRequest:
    method, path, _ = head.first.split(" ", 2)
    return LoggedRequest(method, path, head.header("range"), head.header("if-match"), head.header("authorization"))


def _status_answer(action: Status) -> _Answer:
    document = f"<Error><Code>{action.code}</Code><Message>injected</Message></Error>".encode()
    headers: tuple[tuple[str, str], ...] = (("Content-Type", "application/xml"),)
    if action.retry_after is not None:
        headers += (("Retry-After", action.retry_after),)
    return _Answer(_Head(f"HTTP/1.1 {action.status} Injected", headers), document)


async def _interrupted(hop: _Hop, fault: ArmedFault) -> bool:
    """Delay, stall or cut here; return whether the answer goes on."""
    if isinstance(fault.action, Delay):
        await asyncio.sleep(fault.action.seconds)
        return True
    if isinstance(fault.action, Cut):
        return False
    hung_up = asyncio.ensure_future(hop.reader.read(1))
    try:
        while not fault.is_released():
            done, _ = await asyncio.wait([hung_up], timeout=0.02)
            if done:
                return False
    finally:
        hung_up.cancel()
        with contextlib.suppress(asyncio.CancelledError, OSError):
            await hung_up
    return True
