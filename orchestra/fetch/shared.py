"""Fetching in a cluster: the owners of an extent first, the store last.

Owns: who is asked in which order, what may be in flight between nodes, what happens when no owner gives the bytes
(`ufs_fallback`). Leaves to others: who owns what (the ring, by `Placement`), requests (cluster.peers), the store
(fetcher).

Nobody waits in a circle, because each wait is of a kind that only waits for kinds below it:
 1. asking an owner to read through (bytes of the budget `between`);
 2. reading the store for somebody (bytes of the store's budget), where other owners are asked for what they *hold*;
 3. giving what is held (no budget).
A request of another node never leads to the first kind, and of those that keep an extent each asks only who stands
before it in the ring's order. Where two nodes see different rings and each waits for the
other in a flight that both joined, the one that was asked gives up first (the daemon's side, Cause.ELSEWHERE).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from orchestra.cluster.heat import Spread
from orchestra.cluster.peer_wire import ExtentPart
from orchestra.cluster.peers import Peers
from orchestra.errors import StoreUnavailableError
from orchestra.fetch.budget import ByteBudget, Priority
from orchestra.fetch.fetcher import Fetcher
from orchestra.observe.stalls import Marks
from orchestra.stores.contract import Buffer, UnderStore
from orchestra.values import ByteRange, ObjectInfo

log = logging.getLogger(__name__)


# A dead owner of a busy mount is in the way of thousands of reads a second.
_WARN_EVERY_NS = 10_000_000_000
# After so many questions in vain a node is asked every so many times only, until it holds something again or the ring
# changes: in a cold cluster that is 1 question in 16 instead of 1 for every block.
_VAIN_MAX = 64
_VAIN_ASKED_EVERY = 16
# Nodes behind the owners that are asked to keep what no owner can.
_STAND_INS = 2


class Placement(Protocol):
    """Who owns what, as this node sees it now."""

    @property
    def node_id(self) -> str:
        """This node."""
        ...

    def owners(self, digest: str, extent_index: int, replicas: int) -> tuple[str, ...]:
        """The extent's owners, the first one first; empty before there is a ring."""
        ...

    def holders(self, digest: str, extent_index: int, replicas: int) -> tuple[str, ...]:
        """Other nodes that may hold the extent: owners now, or before the ring changed."""
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
    is_kept: bool = True  # on this node, once it is here


@dataclass(slots=True)
class SharedStatistics:
    """Counts since the start."""

    from_peers: int = 0
    from_peers_bytes: int = 0
    from_holders: int = 0  # held by another owner while this one read through
    from_copies: int = 0  # of those from peers: from another holder than the first owner of an extent read often
    from_stand_ins: int = 0  # of those from peers: by the next node of the ring, because no owner can keep it
    from_store: int = 0
    fallbacks: int = 0  # from the store, though others own it


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
        # How often in a row a node did not hold what it was asked for.
        self._vain: dict[str, int] = {}
        self.spread = Spread(sum(placement.node_id.encode()))
        peers.heard = self._heard
        # The nodes that keep copies of what this one owns, because it is read so often.
        self.copies_of: Callable[[str, int], Sequence[str]] = lambda digest, index: ()
        # Called with what was read from the store and is here now, and who else is to have it.
        self.offer: Callable[[ExtentPart, Sequence[str]], None] | None = None

    def part(self, part: SharedPart, priority: Priority, marks: Marks) -> _Bringing:
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

    def other_owners(self, part: SharedPart) -> Sequence[str]:
        """Whom to ask where this node cannot keep it, be it an owner or not."""
        owners = self.placement.owners(part.wire.digest, part.wire.extent_index, part.replicas)
        return [owner for owner in owners if owner != self.placement.node_id]

    def ring_changed(self) -> None:
        """Other nodes may hold what this one owns now: ask them again."""
        self._vain.clear()
        self.spread.clear()

    async def from_peers(self, part: SharedPart, owners: Sequence[str]) -> Buffer | None:
        """Return the bytes from the first node that gives them: where several hold the extent because it is read so
        often, the one whose turn it is, then its owners, then the others of those that hold it."""
        copies = self._copies(part)
        if copies and copies[0][0]:  # at place 0 is the first owner
            data = await self._from_copy(part, *copies.pop(0), owners)
            if data is not None:
                return data
        data = await self.peers.read(part.wire, owners)
        for place, node_id in copies:
            if data is None and node_id not in owners:
                data = await self._from_copy(part, place, node_id, ())
        return await self._from_stand_in(part, owners) if data is None else data

    def _copies(self, part: SharedPart) -> list[tuple[int, str]]:
        """The places at which it is said to be, and the nodes there, the one whose turn it is first."""
        digest, index = part.wire.digest, part.wire.extent_index
        places = self.spread.holders((digest, index), part.replicas, self.fetcher.stalls.now_ns())
        order = self.placement.owners(digest, index, max(places) + 1) if places else ()
        return [(at, order[at]) for at in places if at < len(order) and order[at] != self.placement.node_id]

    async def _from_copy(self, part: SharedPart, place: int, node_id: str, owners: Sequence[str]) -> Buffer | None:
        data = await self.peers.read_copy(part.wire, node_id, owners)
        if data is None:
            name = (part.wire.digest, part.wire.extent_index)
            self.spread.lacked(name, place, self.fetcher.stalls.now_ns())
        self.statistics.from_copies += data is not None
        return data

    async def _from_stand_in(self, part: SharedPart, owners: Sequence[str]) -> Buffer | None:
        """Return the bytes from the next node of the ring's order, which reads them through and keeps them: where all
        owners are full or gone, all nodes ask the same one then, and the store is asked by that one alone. A node that
        keeps it asks only those before itself: two that asked one another would each wait for the other's flight."""
        if self.ufs_fallback == "fail" or not all(self.peers.is_no_keeper(owner) for owner in owners):
            return None
        wire, own = part.wire, self.placement.node_id
        order = self.placement.owners(wire.digest, wire.extent_index, part.replicas + _STAND_INS)
        if part.is_kept and own in order:
            order = order[: order.index(own)]
        others = [
            node_id for node_id in order[part.replicas :] if node_id != own and not self.peers.is_no_keeper(node_id)
        ]
        data = await self.peers.read(wire, others[:1]) if others else None
        self.statistics.from_stand_ins += data is not None
        return data

    def _heard(self, wire: ExtentPart, places: int) -> None:
        self.spread.told((wire.digest, wire.extent_index), places, self.fetcher.stalls.now_ns())

    async def from_holders(self, part: SharedPart) -> Buffer | None:
        """Return the bytes if another node holds them. Where that was in vain for long, as it is while everything is
        cold, hardly anybody is asked."""
        wire = part.wire
        for node_id in self._holders(part):
            vain = self._vain.get(node_id, 0)
            if vain >= _VAIN_MAX and vain % _VAIN_ASKED_EVERY:
                self._vain[node_id] = vain + 1
                continue
            data = await self.peers.read(replace(wire, held_only=True), (node_id,))
            if data is not None:
                self._vain[node_id] = 0
                self.statistics.from_holders += 1
                return data
            self._vain[node_id] = vain + 1
        return None

    def _holders(self, part: SharedPart) -> Sequence[str]:
        """Other nodes that may hold it: owners, who keeps a copy because it is read so often, and at a node that stands
        in for an owner the others that may do so."""
        digest, index, own = part.wire.digest, part.wire.extent_index, self.placement.node_id
        found = [*self.placement.holders(digest, index, part.replicas), *self.copies_of(digest, index)]
        if part.is_for_peer and not self.is_owner(digest, index, part.replicas):
            found += self.placement.owners(digest, index, part.replicas + _STAND_INS)[part.replicas :]
        return [node_id for node_id in dict.fromkeys(found) if node_id != own]

    def offer_copies(self, part: SharedPart) -> None:
        """What was read from the store is here now: its other owners are to have it as well."""
        if self.offer is None:
            return
        owners = self.placement.owners(part.wire.digest, part.wire.extent_index, part.replicas)
        if owners[1:] and owners[0] == self.placement.node_id:
            self.offer(part.wire, owners[1:])

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


class _HeldFirst:
    """What the fetcher reads from: other nodes that hold the bytes, then the store. `read` as the contract of stores
    has it; nothing else is asked of it."""

    __slots__ = ("_part", "_shared", "is_read", "store_id")

    def __init__(self, shared: SharedFetcher, part: SharedPart) -> None:
        self._shared = shared
        self._part = part
        self.store_id = part.store.store_id
        self.is_read = False  # from the store

    async def read(self, info: ObjectInfo, byte_range: ByteRange) -> Buffer:
        """See UnderStore."""
        data = await self._shared.from_holders(self._part)
        if data is None:
            self._shared.statistics.from_store += 1
            self.is_read = True
            data = await self._part.store.read(info, byte_range)
        return data


class _Bringing:
    """The bytes of one part for as long as somebody works with them."""

    __slots__ = ("_held_bytes", "_is_from_store", "_marks", "_part", "_priority", "_shared", "_stored")

    def __init__(self, shared: SharedFetcher, part: SharedPart, priority: Priority, marks: Marks) -> None:
        self._shared = shared
        self._part = part
        self._priority = priority
        self._marks = marks
        self._held_bytes = 0
        self._stored: Any = None
        self._is_from_store = False

    async def __aenter__(self) -> Buffer:
        shared, part = self._shared, self._part
        owners = shared.asked_owners(part)
        if owners or not (part.is_kept or part.is_for_peer):
            data = await self._from(owners if part.is_kept else shared.other_owners(part))
            if data is not None:
                return data
        if owners:
            shared.check_fallback(part, owners)
        source = _HeldFirst(shared, part)
        self._stored = shared.fetcher.part(source, part.info, part.object_range, self._priority, self._marks)
        stored: Buffer = await self._stored.__aenter__()
        self._is_from_store = source.is_read
        self._marks.is_from_peer = not source.is_read
        return stored

    async def _from(self, owners: Sequence[str]) -> Buffer | None:
        shared, length = self._shared, self._part.object_range.length
        await shared.between.acquire(length, self._priority)
        self._held_bytes = length
        asked_ns = shared.fetcher.stalls.now_ns()
        try:
            data = await shared.from_peers(self._part, owners)
        except BaseException:
            self._release()
            raise
        if data is None:
            self._release()
            return None
        self._marks += (asked_ns, shared.fetcher.stalls.now_ns())
        self._marks.is_from_peer = True
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
            if self._is_from_store and error[0] is None:
                self._shared.offer_copies(self._part)
