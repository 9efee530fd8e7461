"""What other nodes read here: GET /v1/peer/extents/DIGEST/INDEX, sent by the kernel from the extent's file, and
POST /v1/peer/blocks, many small objects in one answer.

Stands in front of aiohttp on the peers' port, as `hot` does on the clients' socket: a connection that begins with such
a request is answered here for as long as it lasts; every other one is aiohttp's.

While blocks have to be fetched first, an interim answer (102) says every half second that this node is at work on it:
who asked can tell a slow store from a node that is dead.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import IO, cast

from aiohttp.web_protocol import RequestHandler

from orchestra.blocks.reader import FilePlace
from orchestra.cluster.peer_blocks import BLOCKS, BODY_BYTES_MAX, parse_blocks
from orchestra.cluster.peer_wire import (
    CHECKSUMS,
    COPIES,
    EXTENTS,
    HEAD_BYTES_MAX,
    Cause,
    ExtentPart,
    PeerError,
    encode_checksums,
    encode_places,
    parse_part,
    status_of,
)
from orchestra.cluster.proof import ProofChecker
from orchestra.daemon.api.context import Activity
from orchestra.daemon.api.peer_batch import HEAD, answer_batch
from orchestra.daemon.peers import HeldPart, PeerService
from orchestra.errors import ProofError

log = logging.getLogger(__name__)

WORKING_EVERY_S = 0.5
# A whole block to a peer that takes it slowly; one that takes nothing holds a file open for no longer.
_SEND_TIMEOUT_S = 60.0
# From the first byte of a request to its last.
_RECEIVE_TIMEOUT_S = 10.0
_PREFIXES = (f"GET {EXTENTS}".encode(), f"POST {BLOCKS} ".encode())
_WORKING = b"HTTP/1.1 102 Processing\r\n\r\n"


@dataclass(frozen=True, slots=True)
class _Asked:
    """The head of a request. Names of headers are as proofs have them: Range, Orchestra-From."""

    method: str
    target: str
    headers: Mapping[str, str]

    @property
    def body_length(self) -> int:
        """Bytes that follow; more than any body may have where nobody can tell."""
        length = self.headers.get("Content-Length", "0")
        is_number = length.isascii() and length.isdigit() and len(length) < 16
        return int(length) if is_number and "Transfer-Encoding" not in self.headers else BODY_BYTES_MAX + 1


def _parsed(head: bytes) -> _Asked:
    lines = head.decode("latin-1").split("\r\n")
    method, _, rest = lines[0].partition(" ")
    headers: dict[str, str] = {}
    for line in lines[1:]:
        name, _, value = line.partition(":")
        headers[name.strip().title()] = value.strip()
    return _Asked(method, rest.partition(" ")[0], headers)


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
        self._can_write = asyncio.Event()
        self._can_write.set()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """See asyncio.BaseProtocol."""
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        """See asyncio.Protocol."""
        if self._inner is not None:
            self._inner.data_received(data)
            return
        self._received += data
        if self._task is None:
            self._take_next()
        # A node asks for one thing at a time. That it has all of an answer it may know, and ask for the next, before
        # this loop does: a thread has sent it.
        elif len(self._received) > HEAD_BYTES_MAX + BODY_BYTES_MAX and self._transport is not None:
            self._transport.abort()

    def _take_next(self) -> None:
        """Answer the next request if it is here whole."""
        transport = self._transport
        if transport is None or transport.is_closing():
            return
        if not any(self._received.startswith(prefix[: len(self._received)]) for prefix in _PREFIXES):
            self._give_away(transport)
            return
        end = self._received.find(b"\r\n\r\n")
        if end < 0 or end > HEAD_BYTES_MAX:
            if len(self._received) > HEAD_BYTES_MAX:
                transport.abort()
            elif self._timer is None:
                self._set_timer(_RECEIVE_TIMEOUT_S)
            return
        asked = _parsed(self._received[:end])
        stop = end + 4 + asked.body_length
        if asked.body_length > BODY_BYTES_MAX:
            transport.abort()
        elif len(self._received) < stop:
            if self._timer is None:
                self._set_timer(_RECEIVE_TIMEOUT_S)
        else:
            body, self._received = self._received[end + 4 : stop], self._received[stop:]
            self._set_timer(None)
            self._task = asyncio.create_task(self._answer(asked, body))

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

    async def _answer(self, asked: _Asked, body: bytes) -> None:
        self._activity.begin()
        try:
            await self._answer_or_refuse(asked, body)
        # The last one is what asyncio makes of any error of a first sendfile, also that the peer is gone.
        except (OSError, TimeoutError, asyncio.SendfileNotAvailableError) as error:
            log.debug("an answer could not be sent: %s", error)
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
        if self._received:
            self._take_next()

    async def _answer_or_refuse(self, asked: _Asked, body: bytes) -> None:
        try:
            if self._checker is not None:
                self._checker.check(asked.method, asked.target, asked.headers, body)
            if asked.method == "POST":
                parts = parse_blocks(body)
                self._write(HEAD)
                await answer_batch(self._service, parts, self._write_all, WORKING_EVERY_S)
                return
            held = await self._held(parse_part(asked.target, asked.headers.get("Range", "")))
        except (ProofError, ValueError) as error:
            self._write_refusal(PeerError(Cause.REFUSED, str(error)))
            return
        except PeerError as error:
            self._write_refusal(error)
            return
        try:
            await self._send(held)
        finally:
            held.close()

    async def _held(self, part: ExtentPart) -> HeldPart:
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

    async def _write_all(self, pieces: Sequence[bytes]) -> None:
        """Write, and wait while the peer takes what was written before."""
        if self._transport is None or self._transport.is_closing():
            raise ConnectionResetError("the peer went away")
        self._transport.writelines(pieces)
        if not self._can_write.is_set():
            async with asyncio.timeout(_SEND_TIMEOUT_S):
                await self._can_write.wait()

    async def _send(self, held: HeldPart) -> None:
        place = held.place
        transport = self._transport
        if transport is None or transport.is_closing():
            return
        headers = {CHECKSUMS: encode_checksums(place.checksums)}
        if held.places:
            headers[COPIES] = encode_places(held.places)
        transport.write(_head_of(206, place.length, headers))
        sent = 0
        if not transport.get_write_buffer_size():
            sent = await self._service.send(transport.get_extra_info("socket").fileno(), held)
        if sent < place.length:
            await self._send_rest(transport, place, sent)

    async def _send_rest(self, transport: asyncio.Transport, place: FilePlace, sent: int) -> None:
        rest = FilePlace(place.fd, place.offset + sent, place.length - sent, ())
        await self._service.warm(rest)
        async with asyncio.timeout(_SEND_TIMEOUT_S):
            file = cast("IO[bytes]", _File(rest.fd))
            loop = asyncio.get_running_loop()
            count = await loop.sendfile(transport, file, rest.offset, rest.length, fallback=False)
        if count != rest.length:
            raise OSError("the file is shorter than it should be")

    def close(self) -> None:
        """Break off what is under way."""
        self._abort()

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
        self._can_write.set()
        if self._task is not None:
            self._task.cancel()
        if self._inner is not None:
            self._inner.connection_lost(exc)

    def pause_writing(self) -> None:
        """See asyncio.BaseProtocol."""
        self._can_write.clear()
        if self._inner is not None:
            self._inner.pause_writing()

    def resume_writing(self) -> None:
        """See asyncio.BaseProtocol."""
        self._can_write.set()
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
