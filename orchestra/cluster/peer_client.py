"""One other node, as this one asks it for blocks.

Owns: its connections, how many requests at a time, what its answers must look like, the checksum of every block that
comes. Leaves to others: which node is asked for what, and for how long it is left alone after a failure (peers).
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping

import crc32c

from orchestra.cluster.peer_batch import BatchClient, Prove
from orchestra.cluster.peer_blocks import SMALL_BYTES_MAX
from orchestra.cluster.peer_wire import (
    CHECKSUMS,
    WORKING_MAX_S,
    Cause,
    ExtentPart,
    PeerError,
    cause_of,
    parse_checksums,
)
from orchestra.config_cluster import split_address
from orchestra.errors import StoreUnavailableError
from orchestra.stores.contract import Buffer
from orchestra.stores.range_client import ConnectTimeoutError, NotPlainError, RangeAnswer, RangeClient

CONNECT_TIMEOUT_S = 1.0
# Without a byte, or a word that it is at work on it. A node that is stopped is asked no longer than this.
STALL_TIMEOUT_S = 2.0
# Of 4 MiB each: what fills 25 Gbit/s at 20 ms a request.
REQUESTS_MAX = 16


def no_proof(method: str, target: str, range_header: str, body: bytes) -> Mapping[str, str]:
    """Between addresses of one machine without a secret."""
    return {}


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
    ) -> None:
        self.address = address
        self._prove = prove
        self._block_size_bytes = block_size_bytes
        self._ranges = RangeClient(
            f"http://{address}",
            ssl_context=None,
            stall_timeout_s=stall_timeout_s,
            connect_timeout_s=connect_timeout_s,
        )
        self._free = asyncio.Semaphore(requests_max)
        host, port = split_address(address)
        self.batches = BatchClient(
            *(address, host, port, prove), connect_timeout_s=connect_timeout_s, stall_timeout_s=stall_timeout_s
        )

    async def fetch(self, part: ExtentPart) -> Buffer:
        """Return exactly those bytes, each block's checksum compared: a small object in a batch with others, anything
        else alone. Raises PeerError."""
        if part.size_bytes <= min(self._block_size_bytes, SMALL_BYTES_MAX):
            return await self.batches.fetch(part)
        return await self.fetch_alone(part)

    async def fetch_alone(self, part: ExtentPart) -> memoryview:
        """As `fetch`, in a request of its own. Cancelling closes the connection."""
        async with self._free:
            return self._checked(part, await self._get(part))

    def close_idle(self) -> None:
        """Close idle connections; those in use close when their requests end."""
        self._ranges.close_idle()
        self.batches.close_idle()

    async def _get(self, part: ExtentPart) -> RangeAnswer:
        target = part.target
        headers = {
            "host": self.address,
            "Range": part.range_header,
            **self._prove("GET", target, part.range_header, b""),
        }
        try:
            async with asyncio.timeout(WORKING_MAX_S):
                return await self._ranges.get(target, headers, part.file_range)
        except ConnectTimeoutError as error:
            raise PeerError(Cause.CONNECT_TIMEOUT, str(error)) from error
        except TimeoutError as error:
            raise PeerError(Cause.NO_PROGRESS, str(error)) from error
        except NotPlainError as error:
            raise PeerError(Cause.UNREADABLE, str(error)) from error
        except (StoreUnavailableError, ConnectionResetError, BrokenPipeError) as error:
            raise PeerError(Cause.CUT_SHORT, str(error)) from error
        except OSError as error:
            raise PeerError(Cause.CONNECT_REFUSED, str(error)) from error

    def _checked(self, part: ExtentPart, answer: RangeAnswer) -> memoryview:
        if answer.status != 206:
            text = bytes(answer.data[:200]).decode("utf-8", "replace")
            raise PeerError(cause_of(answer.status), f"status {answer.status}: {text}")
        if len(answer.data) != part.file_range.length:
            raise PeerError(Cause.UNREADABLE, f"{len(answer.data)} bytes where {part.file_range.length} were asked for")
        step = self._block_size_bytes
        starts = range(0, len(answer.data), step)
        try:
            checksums = parse_checksums(answer.headers.get(CHECKSUMS, ""), len(starts))
        except ValueError as error:
            raise PeerError(Cause.UNREADABLE, str(error)) from error
        for start, checksum in zip(starts, checksums, strict=True):
            if crc32c.crc32c(answer.data[start : start + step]) != checksum:
                raise PeerError(Cause.CHECKSUM, f"the bytes at {part.file_range.start + start} are not the object's")
        return answer.data
