"""Many misses on one connection: how a mount asks, which has no thread per waiting reader.

    POST /v1/ensure_stream HTTP/1.1          the connection is this protocol's from here on
    [serial, path, version, digest, size_bytes, start, stop]     one JSON array a line, as many as you like
    -> HTTP/1.1 101 ...
    -> serial 1          the bytes are present now
    -> serial 0          ask again by POST /v1/ensure: it says why they are not

Answers come in the order in which fetches end, many in one write where many end at once. A request costs no task of its
own: it is a callback on the fetch. Errors, a full cache and anything that needs a word go the other way, so that there
is one place that explains.
"""

from __future__ import annotations

import asyncio
import logging
from functools import partial

import msgspec

from orchestra.daemon.api.context import Activity
from orchestra.daemon.assembly import Node
from orchestra.errors import OrchestraError
from orchestra.values import ByteRange

log = logging.getLogger(__name__)

UPGRADE = b"POST /v1/ensure_stream HTTP/1.1\r\n"
_SWITCHED = b"HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: orchestra-ensure\r\n\r\n"
# A line is a path of 4,096 bytes, escaped, and a few numbers.
_LINE_BYTES_MAX = 64 * 1024

_decode = msgspec.json.Decoder(tuple[int, str, str, str, int, int, int]).decode


class EnsureStream:
    """One connection's stream of requests."""

    def __init__(self, node: Node, activity: Activity, transport: asyncio.Transport) -> None:
        self._node = node
        self._activity = activity
        self._transport = transport
        self._rest = b""
        self._answers: list[bytes] = []
        self._loop = asyncio.get_running_loop()
        transport.write(_SWITCHED)

    def data_received(self, data: bytes) -> None:
        """Take what arrived; it may end in the middle of a line."""
        *lines, self._rest = (self._rest + data).split(b"\n")
        if len(self._rest) > _LINE_BYTES_MAX:
            self._transport.abort()
            return
        for line in lines:
            try:
                serial, path, version, digest, size, start, stop = _decode(line)
            except msgspec.MsgspecError:  # not our client: a line without a serial cannot be answered
                log.warning("a client sent what is no request; its connection was closed")
                self._transport.abort()
                return
            self._activity.begin()
            try:
                self._start(serial, path, version, digest, size, ByteRange(start, stop))
            except (OrchestraError, ValueError):
                self._answer(serial, False)

    def _start(self, serial: int, path: str, version: str, digest: str, size: int, wanted_range: ByteRange) -> None:
        engine = self._node.engine
        flight = engine.ensure_soon(engine.want(path, version, size, wanted_range, digest=digest))
        if isinstance(flight, bool):
            self._answer(serial, flight)
        else:
            flight.add_done_callback(partial(self._landed, serial))

    def _landed(self, serial: int, flight: asyncio.Future[bool]) -> None:
        self._answer(serial, not flight.cancelled() and flight.exception() is None and flight.result())

    def _answer(self, serial: int, is_present: bool) -> None:
        self._activity.end()
        if not self._answers:
            self._loop.call_soon(self._flush)
        self._answers.append(b"%d %d\n" % (serial, is_present))

    def _flush(self) -> None:
        answers, self._answers = self._answers, []
        if not self._transport.is_closing():
            self._transport.write(b"".join(answers))
