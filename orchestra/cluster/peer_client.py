"""One other node, as this one asks it for blocks.

Owns: its connections, how many requests at a time, what its answers must look like, the checksum of every block that
comes. Leaves to others: which node is asked for what, and for how long it is left alone after a failure (peers).
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Mapping

from orchestra.cluster.peer_batch import BatchClient, Heard, Prove
from orchestra.cluster.peer_blocks import SMALL_BYTES_MAX
from orchestra.cluster.peer_socket import BlockSocket, IdleClosedError, PeerAnswer, Receivers
from orchestra.cluster.peer_wire import (
    CHECKSUMS,
    COPIES,
    WORKING_MAX_S,
    Cause,
    ExtentPart,
    PeerError,
    cause_of,
    parse_checksums,
    parse_places,
)
from orchestra.config_cluster import split_address
from orchestra.stores.contract import Buffer

CONNECT_TIMEOUT_S = 1.0
# Without a byte, or a word that it is at work on it. A node that is stopped is asked no longer than this.
STALL_TIMEOUT_S = 2.0
# Of 4 MiB each: what fills 25 Gbit/s at 20 ms a request.
REQUESTS_MAX = 16


def no_proof(method: str, target: str, range_header: str, body: bytes) -> Mapping[str, str]:
    """Between addresses of one machine without a secret."""
    return {}


def _deaf(part: ExtentPart, places: int) -> None:
    """For who always asks in the ring's order."""


class PeerClient:
    """Asks one node at one address. One event loop; connects to nothing before its first request."""

    def __init__(
        self,
        address: str,
        prove: Prove = no_proof,
        *,
        block_size_bytes: int,
        connect_timeout_s: float = CONNECT_TIMEOUT_S,
        stall_timeout_s: float = STALL_TIMEOUT_S,
        requests_max: int = REQUESTS_MAX,
        receivers: Receivers | None = None,
        heard: Heard = _deaf,
    ) -> None:
        """`receivers` are shared with the clients of other nodes; `heard` is told who else holds what came."""
        self.address = address
        self._prove = prove
        self._block_size_bytes = block_size_bytes
        self._connect_timeout_s = connect_timeout_s
        self._stall_timeout_s = stall_timeout_s
        self._receivers = Receivers() if receivers is None else receivers
        self._idle: list[BlockSocket] = []
        self._is_closed = False
        self._free = asyncio.Semaphore(requests_max)
        host, port = split_address(address)
        self.batches = BatchClient(
            *(address, host, port, prove),
            connect_timeout_s=connect_timeout_s,
            stall_timeout_s=stall_timeout_s,
            heard=heard,
        )
        self._heard = heard
        self.connections_count = 0  # made since the start, but for those of batches

    async def fetch(self, part: ExtentPart) -> Buffer:
        """Return exactly those bytes, each block's checksum compared: a small object in a batch with others, anything
        else alone. Raises PeerError."""
        if part.size_bytes <= min(self._block_size_bytes, SMALL_BYTES_MAX):
            return await self.batches.fetch(part)
        return await self.fetch_alone(part)

    async def fetch_alone(self, part: ExtentPart) -> memoryview:
        """As `fetch`, in a request of its own. Cancelling closes the connection."""
        async with self._free:
            try:
                async with asyncio.timeout(WORKING_MAX_S):
                    return self._checked(part, await self._get(part))
            except TimeoutError as error:
                raise PeerError(Cause.NO_PROGRESS, f"not done within {WORKING_MAX_S:g}s") from error

    def close_idle(self) -> None:
        """Close idle connections; those in use close when their requests end."""
        self._is_closed = True
        while self._idle:
            self._idle.pop().close()
        self.batches.close_idle()

    async def _get(self, part: ExtentPart) -> PeerAnswer:
        target = part.target
        headers = {
            "host": self.address,
            "Range": part.range_header,
            **self._prove("GET", target, part.range_header, b""),
        }
        lines = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
        request = f"GET {target} HTTP/1.1\r\n{lines}\r\n".encode("latin-1")
        while self._idle:
            try:
                return await self._over(self._idle.pop(), request, part)
            except IdleClosedError:
                continue  # it was idle too long; the request did not reach anybody
        try:
            return await self._over(await self._connect(), request, part)
        except IdleClosedError as error:
            raise PeerError(Cause.CUT_SHORT, "the connection was closed without an answer") from error

    async def _over(self, connection: BlockSocket, request: bytes, part: ExtentPart) -> PeerAnswer:
        answer = await self._receivers.exchange(connection, request, part.file_range.length, self._block_size_bytes)
        if connection.is_usable and not self._is_closed:
            self._idle.append(connection)
        else:
            connection.close()
        return answer

    async def _connect(self) -> BlockSocket:
        host, port = split_address(self.address)
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(self._connect_timeout_s):
                family, _, _, _, address = (await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM))[0]
                sock = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
                try:
                    await loop.sock_connect(sock, address)
                except BaseException:
                    sock.close()
                    raise
        except TimeoutError as error:
            raise PeerError(Cause.CONNECT_TIMEOUT, f"no connection within {self._connect_timeout_s:g}s") from error
        except OSError as error:
            raise PeerError(Cause.CONNECT_REFUSED, str(error)) from error
        self.connections_count += 1
        return BlockSocket(sock, self._stall_timeout_s)

    def _checked(self, part: ExtentPart, answer: PeerAnswer) -> memoryview:
        if answer.status != 206:
            text = bytes(answer.data[:200]).decode("utf-8", "replace")
            raise PeerError(cause_of(answer.status), f"status {answer.status}: {text}")
        if len(answer.data) != part.file_range.length:
            raise PeerError(Cause.UNREADABLE, f"{len(answer.data)} bytes where {part.file_range.length} were asked for")
        try:
            checksums = parse_checksums(answer.headers.get(CHECKSUMS.lower(), ""), len(answer.checksums))
        except ValueError as error:
            raise PeerError(Cause.UNREADABLE, str(error)) from error
        if checksums != answer.checksums:
            raise PeerError(Cause.CHECKSUM, f"bytes of {part.range_header} are not the object's")
        if places := parse_places(answer.headers.get(COPIES.lower(), "")):
            self._heard(part, places)
        return answer.data
