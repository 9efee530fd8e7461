"""Fetching in a cluster: the owners of an extent first, the store last.

Owns: who is asked in which order, what may be in flight between nodes, what happens when no owner gives the bytes
(`ufs_fallback`). Leaves to others: who owns what (the ring, by `Placement`), requests (cluster.peers), the store
(fetcher).

Nobody waits in a circle, because each wait is of a kind that only waits for kinds below it:
 1. asking an owner to read through (bytes of the budget `between`);
 2. reading the store for somebody (bytes of the store's budget), where other owners are asked for what they *hold*;
 3. giving what is held (no budget).
A request of another node never leads to the first kind. Where two nodes see different rings and each waits for the
other in a flight that both joined, the one that was asked gives up first (the daemon's side, Cause.ELSEWHERE).
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from orchestra.cluster.peer_wire import ExtentPart
from orchestra.cluster.peers import Peers
from orchestra.errors import StoreUnavailableError
from orchestra.fetch.budget import ByteBudget, Priority
from orchestra.fetch.fetcher import Fetcher
from orchestra.stores.contract import Buffer, UnderStore
from orchestra.values import ByteRange, ObjectInfo

log = logging.getLogger(__name__)


# A dead owner of a busy mount is in the way of thousands of reads a second.
_WARN_EVERY_NS = 10_000_000_000


class Placement(Protocol):
    """Who owns what, as this node sees it now."""

    @property
    def node_id(self) -> str:
        """This node."""
        ...

    def owners(self, digest: str, extent_index: int, replicas: int) -> tuple[str, ...]:
        """The extent's owners, the first one first; empty before there is a ring."""
        ...


@dataclass(frozen=True, slots=True)
class SharedPart:
    """Whole neighbouring blocks of one extent that this node lacks. `object_range` lies within the object."""

    store: UnderStore
    info: ObjectInfo
    wire: ExtentPart
    object_range: ByteRange
    replicas: int
    is_for_peer: bool


@dataclass(slots=True)
class SharedStatistics:
    """Counts since the start."""

    from_peers: int = 0
    from_peers_bytes: int = 0
    from_store: int = 0  # as an owner
    fallbacks: int = 0  # from the store, though others own it
    by_cause: dict[str, int] = field(default_factory=dict)


class SharedFetcher:
    """Brings parts from their owners or the store. One event loop."""

    def __init__(
        self, fetcher: Fetcher, peers: Peers, placement: Placement, between: ByteBudget, *, ufs_fallback: str
    ) -> None:
        self.fetcher = fetcher
        self.peers = peers
        self.placement = placement
        self.between = between
        self.ufs_fallback = ufs_fallback
        self.statistics = SharedStatistics()
        self._warned_ns = -_WARN_EVERY_NS

    def part(self, part: SharedPart, priority: Priority, marks: list[int]) -> _Bringing:
        """Give exactly the bytes of `part` to an `async with`; see Fetcher.part. With `ufs_fallback = fail` also raises
        StoreUnavailableError where no owner gave them."""
        return _Bringing(self, part, priority, marks)

    def is_owner(self, digest: str, extent_index: int, replicas: int) -> bool:
        """Whether this node keeps that extent for the cluster."""
        return self.placement.node_id in self.placement.owners(digest, extent_index, replicas)

    def asked_owners(self, part: SharedPart) -> Sequence[str]:
        """Whom to ask to read it through: the owners before this one, all if it is none. Empty for a peer's request."""
        if part.is_for_peer:
            return ()
        owners = self.placement.owners(part.wire.digest, part.wire.extent_index, part.replicas)
        own = self.placement.node_id
        return owners[: owners.index(own)] if own in owners else owners

    def check_fallback(self, part: SharedPart, owners: Sequence[str]) -> None:
        """Count a read of the store that owners should have spared. Raises StoreUnavailableError if it is not
        allowed."""
        self.statistics.fallbacks += 1
        if self.ufs_fallback == "allow":
            return
        if self.ufs_fallback == "fail":
            raise StoreUnavailableError(
                f"{part.info.key!r} is not read from its store, because cluster.ufs_fallback is fail, and none of its "
                f"owners gave it: {', '.join(owners)}"
            )
        now_ns = self.fetcher.stalls.now_ns()
        if now_ns >= self._warned_ns + _WARN_EVERY_NS:
            self._warned_ns = now_ns
            log.warning(
                "%r of %s is read from the store: none of its owners gave it (%s); so were %d parts since the start",
                *(part.info.key, part.store.store_id, ", ".join(owners), self.statistics.fallbacks),
            )


class _Bringing:
    """The bytes of one part for as long as somebody works with them."""

    __slots__ = ("_held_bytes", "_marks", "_part", "_priority", "_shared", "_stored")

    def __init__(self, shared: SharedFetcher, part: SharedPart, priority: Priority, marks: list[int]) -> None:
        self._shared = shared
        self._part = part
        self._priority = priority
        self._marks = marks
        self._held_bytes = 0
        self._stored: Any = None

    async def __aenter__(self) -> Buffer:
        shared, part = self._shared, self._part
        owners = shared.asked_owners(part)
        if owners:
            data = await self._from(owners)
            if data is not None:
                return data
            shared.check_fallback(part, owners)
        shared.statistics.from_store += 1
        self._stored = shared.fetcher.part(part.store, part.info, part.object_range, self._priority, self._marks)
        stored: Buffer = await self._stored.__aenter__()
        return stored

    async def _from(self, owners: Sequence[str]) -> Buffer | None:
        shared, length = self._shared, self._part.object_range.length
        await shared.between.acquire(length, self._priority)
        self._held_bytes = length
        asked_ns = shared.fetcher.stalls.now_ns()
        try:
            data = await shared.peers.read(self._part.wire, owners)
        except BaseException:
            self._release()
            raise
        if data is None:
            self._release()
            return None
        self._marks += (asked_ns, shared.fetcher.stalls.now_ns())
        shared.statistics.from_peers += 1
        shared.statistics.from_peers_bytes += length
        return data

    def _release(self) -> None:
        length, self._held_bytes = self._held_bytes, 0
        if length:
            self._shared.between.release(length)

    async def __aexit__(self, *error: object) -> None:
        self._release()
        if self._stored is not None:
            await self._stored.__aexit__(*error)
