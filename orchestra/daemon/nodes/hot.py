"""Copies of what other nodes read often: the first owner of an extent has more nodes keep it, within `replication.max`.

Owns: asking a node to keep a copy, and doing so when asked; looking now and then whether copies are still there. Leaves
to others: when an extent is hot and who is asked (cluster.heat), moving the bytes (handover), what readers do with it
(fetch.shared).

A copy takes space that is free and leaves before anything that a node owns, as all copies do (blocks.copies): nothing
here removes one. The store is never asked for a copy: it has what the owner holds.
"""

from __future__ import annotations

import asyncio
import logging
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any, Protocol

from orchestra.blocks.geometry import Geometry
from orchestra.blocks.store import BlockStore
from orchestra.clock import Clock
from orchestra.cluster.heat import PLACES_MAX, WINDOW_NS, Heat, Name
from orchestra.cluster.peer_wire import ExtentPart
from orchestra.cluster.records import NodeRecord
from orchestra.config import MountConfig
from orchestra.daemon.cluster import ClusterNode
from orchestra.daemon.nodes.calls import NodeCalls
from orchestra.daemon.nodes.handover import Handover, Offer, offer_from_json, offer_of_held
from orchestra.engine.engine import Engine
from orchestra.errors import OrchestraError, UsageError
from orchestra.values import ObjectId

log = logging.getLogger(__name__)

ROUTE = "/v1/node/copy"
# Copies made at once, at either side: each is an extent that comes behind everything else.
_AT_ONCE = 4
# An extent of 64 MiB on a busy link of 1 Gbit/s; a node that needs longer is asked again when the extent is hot still.
_COPY_TIMEOUT_S = 30.0
_WAITING_MAX = 1024
_KEPT_MAX = 65_536
# Looked at at a time, some milliseconds, when it is found out which of them have left.
_LOOKED_AT_ONCE = 1024


class HotParts(Protocol):
    """What of a daemon is asked for here."""

    geometry: Geometry
    blocks: BlockStore
    engine: Engine
    clock: Clock


class HotCopies:
    """Both sides of it. One event loop."""

    def __init__(
        self, cluster: ClusterNode, calls: NodeCalls, parts: HotParts, handover: Handover, default_replicas: int
    ) -> None:
        """`default_replicas` holds for mounts that do not say how many owners an extent has."""
        self._cluster = cluster
        self._calls = calls
        self._parts = parts
        self._handover = handover
        self._default_replicas = default_replicas
        self._heat = Heat()
        self._ring_digest = ""
        self._mounts: object = None
        self._limits: dict[str, tuple[int, int]] = {}
        # What copies are made of, by name: as it was asked for last.
        self._objects: OrderedDict[Name, tuple[ObjectId, int]] = OrderedDict()
        self._waiting: asyncio.Queue[tuple[Name, int]] = asyncio.Queue(_WAITING_MAX)
        # What this node keeps for others; some of it may have left lately.
        self._kept = KeptExtents(_KEPT_MAX)
        self._free = asyncio.Semaphore(_AT_ONCE)
        self.made = self.refused = 0

    # -- the owner ---------------------------------------------------------------------------------------------------

    def asked(self, part: ExtentPart) -> None:
        """See daemon.peers.CountsReads. Costs next to nothing where the mount's `max` is its `min`."""
        limits = self._limits_of(part.object_id.store_id)
        if limits is None or part.held_only or not self._cluster.is_first_owner(part.digest, part.extent_index):
            return
        self._follow_ring()
        name = (part.digest, part.extent_index)
        share = part.file_range.length / self._parts.geometry.extent_length(part.size_bytes, part.extent_index)
        nodes = len(self._cluster.ring.nodes)
        place = self._heat.asked(name, share, *limits, nodes, self._parts.clock.now_ns())
        if place is None:
            return
        self._objects[name] = (part.object_id, part.size_bytes)
        self._objects.move_to_end(name)
        while len(self._objects) > _KEPT_MAX:
            self._objects.popitem(last=False)
        if self._waiting.full():
            self._heat.answered(name, place, self._parts.clock.now_ns(), is_kept=False)
        else:
            self._waiting.put_nowait((name, place))

    def places_of(self, part: ExtentPart) -> int:
        """See daemon.peers.CountsReads."""
        places = self._heat.places((part.digest, part.extent_index), self._parts.clock.now_ns())
        return places if places and self._cluster.ring.digest == self._ring_digest else 0

    async def run(self) -> None:
        """Have copies made, and look whether they are still there, until cancelled."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._look_again())
            for _ in range(_AT_ONCE):
                tasks.create_task(self._make())

    async def _make(self) -> None:
        while True:
            is_kept = await self._ask(*await self._waiting.get())
            self.made += is_kept
            self.refused += not is_kept

    async def _look_again(self) -> None:
        """Copies leave when their nodes need the space, and their owner may have got more of the extent since."""
        while True:
            await asyncio.sleep(WINDOW_NS / 1e9)
            self._follow_ring()
            for name, places in self._heat.hot(self._parts.clock.now_ns()):
                for place in range(places.bit_length()):
                    if places >> place & 1:
                        await self._ask(name, place)
            await self._forget_left()

    async def _forget_left(self) -> None:
        for looked, (name, size_bytes) in enumerate(self._kept.all(), 1):
            if not self._is_here(name, size_bytes):
                self._kept.remove(name)
            if not looked % _LOOKED_AT_ONCE:
                await asyncio.sleep(0)

    async def _ask(self, name: Name, place: int) -> bool:
        is_kept = False
        digest = self._ring_digest
        try:
            node, offer = self._node_at(name, place), self._offer_of(name)
            if node is not None and offer is not None:
                body = {"from": self._cluster.node_id, "extent": offer.to_json()}
                answer = await self._calls.ask(node, "POST", ROUTE, body, timeout_s=_COPY_TIMEOUT_S)
                is_kept = answer.get("held") is True
        except OrchestraError as error:
            log.info("no copy of an extent that is read often: %s", error)
        finally:
            if digest == self._ring_digest:
                self._heat.answered(name, place, self._parts.clock.now_ns(), is_kept=is_kept)
        return is_kept

    def _node_at(self, name: Name, place: int) -> NodeRecord | None:
        order = self._cluster.owners(*name, place + 1)
        node_id = order[place] if place < len(order) else ""
        return next((node for node in self._cluster.members if node.node_id == node_id), None)

    def _offer_of(self, name: Name) -> Offer | None:
        """What this node holds of the extent."""
        known = self._objects.get(name)
        if known is None:
            return None
        object_id, size_bytes = known
        return offer_of_held(self._parts.blocks, self._parts.geometry, object_id, size_bytes, name[1])

    # -- the node that keeps a copy ------------------------------------------------------------------------------------

    async def answer(self, body: Mapping[str, Any]) -> dict[str, Any]:
        """Return {held: whether this node has it all now} for {from, extent}. Raises UsageError."""
        sender = body.get("from")
        if not isinstance(sender, str):
            raise UsageError("from: expected a node")
        self._follow_ring()
        offer = offer_from_json(body.get("extent"), self._parts.geometry)
        limits = self._limits_of(offer.object_id.store_id)
        name = (offer.object_id.digest(), offer.extent_index)
        if limits is None or self._cluster.node_id not in self._cluster.owners(*name, PLACES_MAX):
            return {"held": False}
        is_own = self._cluster.node_id in self._cluster.owners(*name, limits[0])
        space = self._parts.blocks.space
        space.expect_copies(
            self._parts.blocks.names_of(name[0], offer.size_bytes, range(offer.blocks[0], offer.blocks[0] + 1)),
            is_copy=not is_own,
        )
        async with self._free:
            is_held = await self._handover.take(sender, offer)
        if is_held:
            self._kept.add(name, offer.size_bytes)
        else:
            self._kept.remove(name)
        return {"held": is_held}

    def kept(self, digest: str) -> list[int]:
        """The extents of an object that this node was asked to keep, and holds."""
        found = self._kept.of(digest)
        return [index for index, size_bytes in found.items() if self._is_here((digest, index), size_bytes)]

    def status(self) -> dict[str, int]:
        """Return counts: extents with copies that readers are told of, their copies, copies made and refused since the
        start; copies that this node keeps, but for those that left lately."""
        self._follow_ring()
        hot = [places for _, places in self._heat.hot(self._parts.clock.now_ns())]
        return {
            "hot_extents": len(hot),
            "copies_elsewhere": sum(places.bit_count() for places in hot),
            "copies_made": self.made,
            "copies_refused": self.refused,
            "copies_here": len(self._kept),
        }

    def _is_here(self, name: Name, size_bytes: int) -> bool:
        digest, index = name
        return self._parts.blocks.holds(digest, size_bytes, index * self._parts.geometry.blocks_per_extent)

    # -- both --------------------------------------------------------------------------------------------------------

    def holders(self, digest: str, extent_index: int) -> list[str]:
        """The nodes that keep copies of an extent of this node, as far as it knows."""
        places = self._heat.places((digest, extent_index), self._parts.clock.now_ns())
        if not places or self._cluster.ring.digest != self._ring_digest:
            return []
        order = self._cluster.owners(digest, extent_index, places.bit_length())
        return [node_id for place, node_id in enumerate(order) if places >> place & 1]

    def _follow_ring(self) -> None:
        digest = self._cluster.ring.digest
        if digest != self._ring_digest:
            self._ring_digest = digest
            self._heat.clear()
            self._kept.clear()

    def _limits_of(self, store_id: str) -> tuple[int, int] | None:
        """Owners and most holders of an extent of that store; None where those are the same."""
        mounts = self._parts.engine.mounts
        if mounts is not self._mounts:
            self._mounts = mounts
            self._limits = {
                mount.opened.store_id: limits
                for mount in mounts
                if mount.opened is not None and (limits := limits_of(mount.config, self._default_replicas)) is not None
            }
        return self._limits.get(store_id)


class KeptExtents:
    """Extents of objects, with the objects' sizes; of more than `extents_max` those of the object that was added first
    are forgotten. An object is found without looking at the others."""

    def __init__(self, extents_max: int) -> None:
        self._extents_max = extents_max
        self._by_digest: OrderedDict[str, dict[int, int]] = OrderedDict()
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def of(self, digest: str) -> Mapping[int, int]:
        """The extents of that object, each with the object's size."""
        return self._by_digest.get(digest, {})

    def all(self) -> list[tuple[Name, int]]:
        """All of them, as they are now."""
        return [((digest, index), size) for digest, found in self._by_digest.items() for index, size in found.items()]

    def add(self, name: Name, size_bytes: int) -> None:
        """Remember it."""
        found = self._by_digest.setdefault(name[0], {})
        self._count += name[1] not in found
        found[name[1]] = size_bytes
        while self._count > self._extents_max:
            self._count -= len(self._by_digest.popitem(last=False)[1])

    def remove(self, name: Name) -> None:
        """Forget it, if it is known."""
        found = self._by_digest.get(name[0], {})
        if found.pop(name[1], None) is not None:
            self._count -= 1
            if not found:
                del self._by_digest[name[0]]

    def clear(self) -> None:
        """Forget all."""
        self._by_digest.clear()
        self._count = 0


def limits_of(mount: MountConfig, default_replicas: int) -> tuple[int, int] | None:
    """Return how many owners an extent of that mount has, and how many nodes may have it; None where those are the
    same."""
    replication = mount.replication
    if replication is None or replication.max is None:
        return None
    least = default_replicas if replication.min is None else replication.min
    return (least, replication.max) if replication.max > least else None
