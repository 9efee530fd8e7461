"""GET /v1/peer/extents/DIGEST/INDEX: blocks for other nodes, sent by the kernel from the extent's file.

Stands in front of aiohttp on the peers' port, as `hot` does on the clients' socket: a connection that begins with such
a request is answered here for as long as it lasts; every other one is aiohttp's.

While blocks have to be fetched first, an interim answer (102) says every half second that this node is at work on it:
who asked can tell a slow store from a node that is dead.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping
from typing import IO, cast

from aiohttp.web_protocol import RequestHandler

from orchestra.cluster.peer_wire import (
    CHECKSUMS,
    EXTENTS,
    HEAD_BYTES_MAX,
    Cause,
    ExtentPart,
    PeerError,
    encode_checksums,
    parse_part,
    status_of,
)
from orchestra.cluster.proof import ProofChecker
from orchestra.daemon.api.context import Activity
from orchestra.daemon.peers import HeldPart, PeerService
from orchestra.errors import ProofError

log = logging.getLogger(__name__)

WORKING_EVERY_S = 0.5
# A whole block to a peer that takes it slowly; one that takes nothing holds a file open for no longer.
_SEND_TIMEOUT_S = 60.0
_HEAD_TIMEOUT_S = 10.0
_PREFIX = f"GET {EXTENTS}".encode()
_WORKING = b"HTTP/1.1 102 Processing\r\n\r\n"


class PeerConnection(asyncio.Protocol):
    """One connection of another node."""

    def __init__(
        self,
        make_inner: Callable[[], RequestHandler],
        service: PeerService,
        checker: ProofChecker | None,
        activity: Activity,
    ) -> None:
        self._make_inner = make_inner
        self._inner: RequestHandler | None = None
        self._service = service
        self._checker = checker
        self._activity = activity
        self._transport: asyncio.Transport | None = None
        self._received = b""
        self._task: asyncio.Task[None] | None = None
        self._timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """See asyncio.BaseProtocol."""
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        """See asyncio.Protocol."""
        if self._inner is not None:
            self._inner.data_received(data)
            return
        assert self._transport is not None
        self._received += data
        if not self._received.startswith(_PREFIX[: len(self._received)]):
            self._give_away(self._transport)
        elif self._task is not None or len(self._received) > HEAD_BYTES_MAX:
            self._transport.abort()  # a node asks for one thing at a time, in a head of bounded size
        elif self._received.endswith(b"\r\n\r\n"):
            head, self._received = self._received, b""
            self._set_timer(None)
            self._task = asyncio.create_task(self._answer(head))
        elif self._timer is None:
            self._set_timer(_HEAD_TIMEOUT_S)

    def _give_away(self, transport: asyncio.Transport) -> None:
        self._set_timer(None)
        self._inner = self._make_inner()
        self._inner.connection_made(transport)
        received, self._received = self._received, b""
        self._inner.data_received(received)

    def _set_timer(self, seconds: float | None) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if seconds is not None and self._transport is not None:
            self._timer = asyncio.get_running_loop().call_later(seconds, self._transport.abort)

    async def _answer(self, head: bytes) -> None:
        self._activity.begin()
        try:
            try:
                held = await self._held(head)
            except PeerError as error:
                self._write_refusal(error)
                return
            try:
                await self._send(held)
            finally:
                held.close()
        except (OSError, TimeoutError) as error:
            log.debug("a block could not be sent: %s", error)
            self._abort()
        except asyncio.CancelledError:
            self._abort()
            raise
        except Exception:
            log.exception("a request of another node failed")
            self._abort()
        finally:
            self._task = None
            self._activity.end()

    async def _held(self, head: bytes) -> HeldPart:
        part = self._parsed(head)
        held = self._service.held(part)
        if held is not None:
            return held
        if part.held_only:
            raise PeerError(Cause.NOT_HELD, "not held")
        bringing = asyncio.ensure_future(self._service.bring(part))
        try:
            while not (await asyncio.wait({bringing}, timeout=WORKING_EVERY_S))[0]:
                self._write(_WORKING)
        except asyncio.CancelledError:
            bringing.cancel()
            raise
        return bringing.result()

    def _parsed(self, head: bytes) -> ExtentPart:
        """Return what is asked for. Raises PeerError if it is nothing, or nobody of this cluster asks."""
        lines = head[:-4].decode("latin-1").split("\r\n")
        _, _, rest = lines[0].partition(" ")
        target, _, _ = rest.partition(" ")
        headers: dict[str, str] = {}
        for line in lines[1:]:
            name, _, value = line.partition(":")
            headers[name.strip().title()] = value.strip()
        try:
            if self._checker is not None:
                self._checker.check("GET", target, headers)
            return parse_part(target, headers.get("Range", ""))
        except (ProofError, ValueError) as error:
            raise PeerError(Cause.REFUSED, str(error)) from error

    async def _send(self, held: HeldPart) -> None:
        place = held.place
        await self._service.warm(place)
        transport = self._transport
        if transport is None or transport.is_closing():
            return
        transport.write(_head_of(206, place.length, {CHECKSUMS: encode_checksums(place.checksums)}))
        async with asyncio.timeout(_SEND_TIMEOUT_S):
            loop = asyncio.get_running_loop()
            file = cast("IO[bytes]", _File(place.fd))
            await loop.sendfile(transport, file, place.offset, place.length, fallback=False)

    def _write_refusal(self, error: PeerError) -> None:
        body = str(error).encode()[:1000]
        self._write(_head_of(status_of(error.cause), len(body), {}) + body)

    def _write(self, data: bytes) -> None:
        if self._transport is not None and not self._transport.is_closing():
            self._transport.write(data)

    def _abort(self) -> None:
        if self._transport is not None:
            self._transport.abort()

    def eof_received(self) -> bool | None:
        """See asyncio.Protocol."""
        if self._inner is not None:
            self._inner.eof_received()
        return None

    def connection_lost(self, exc: BaseException | None) -> None:
        """See asyncio.BaseProtocol. A fetch that was asked for goes on: others may wait for it, and it is kept."""
        self._set_timer(None)
        self._transport = None
        if self._task is not None:
            self._task.cancel()
        if self._inner is not None:
            self._inner.connection_lost(exc)

    def pause_writing(self) -> None:
        """See asyncio.BaseProtocol."""
        if self._inner is not None:
            self._inner.pause_writing()

    def resume_writing(self) -> None:
        """See asyncio.BaseProtocol."""
        if self._inner is not None:
            self._inner.resume_writing()


class _File:
    """What loop.sendfile asks of a file: its descriptor, which stays its owner's."""

    mode = "rb"

    def __init__(self, fd: int) -> None:
        self._fd = fd

    def fileno(self) -> int:
        return self._fd


def _head_of(status: int, length: int, headers: Mapping[str, str]) -> bytes:
    lines = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
    return f"HTTP/1.1 {status} -\r\n{lines}Content-Length: {length}\r\n\r\n".encode("latin-1")
