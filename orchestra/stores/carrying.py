"""Reads whose bytes another process receives and puts in their place: what stores and that process say to each other.

Owns: the words. Leaves to others: the process and its place for the bytes (engine/courier.py), requests and what an
answer must look like (http_client, range_answers). A store signs, counts, limits and retries such a read as any other;
only the connection, and the bytes, are elsewhere.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

from orchestra.stores.contract import UnderStore
from orchestra.stores.range_client import RangeAnswer
from orchestra.values import ByteRange, ObjectInfo


class NotCarriedError(Exception):
    """Nobody carries this one, and nothing is in its place: read it. No error of the store; never leaves the engine."""


@dataclass(frozen=True, slots=True)
class Server:
    """Where requests go, and how connections are made."""

    base_url: str
    stall_timeout_s: float
    ca_file: str = ""
    allow_invalid_certificates: bool = False


@dataclass(frozen=True, slots=True)
class Errand:
    """A request that only has to be sent, and what its answer has to be. Not shown: it is signed."""

    server: Server
    request: bytes = field(repr=False)
    byte_range: ByteRange
    size_bytes: int
    version: str


class Carrier(Protocol):
    """Knows a place for the bytes of one read."""

    async def carry(self, errand: Errand) -> RangeAnswer | None:
        """Send the request; None when exactly the bytes that were asked for are in their place, else what came instead.

        Raises NotCarriedError, TimeoutError for a server that makes no progress. Cancelling is safe: what is put in
        its place afterwards is still right, and nobody is told of it.
        """
        ...


@runtime_checkable
class PlacingStore(UnderStore, Protocol):
    """A store whose reads can be carried."""

    @property
    def can_place(self) -> bool:
        """Whether `place` may be called; the same for the store's whole life."""
        ...

    async def place(self, info: ObjectInfo, byte_range: ByteRange, carrier: Carrier) -> None:
        """As `read`, but the bytes are where `carrier` puts them. Also raises NotCarriedError."""
        ...


def as_placing(store: UnderStore | None) -> PlacingStore | None:
    """Return the store if its reads can be carried."""
    return store if isinstance(store, PlacingStore) and store.can_place else None
