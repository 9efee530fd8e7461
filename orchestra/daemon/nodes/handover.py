"""A node that is drained hands what it holds over to those that own it now: it tells them, and they take it from it.

Owns: what is offered to whom, taking it, how far it is, and that a node stays drained over restarts. Leaves to others:
the ring without the node (membership), the bytes on the way (cluster.peers), reads, which go on as ever.

What is of a version that the store no longer has is not handed over, nor what nobody can name any more.
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from orchestra.blocks.accounts import CacheFullError
from orchestra.blocks.geometry import Geometry
from orchestra.blocks.rules import Origin
from orchestra.blocks.store import BlockStore
from orchestra.cluster.peer_wire import ExtentPart
from orchestra.cluster.records import NodeRecord
from orchestra.cluster.ring import extent_key
from orchestra.daemon.cluster import ClusterNode
from orchestra.daemon.nodes.calls import NodeCalls
from orchestra.engine.engine import Engine
from orchestra.engine.mounted import OpenedMount
from orchestra.errors import OrchestraError, UsageError
from orchestra.fetch.budget import Priority
from orchestra.metadata.catalog import Catalog
from orchestra.namespace.mounts import MountTable
from orchestra.units import MIB, format_size
from orchestra.values import ByteRange, EntryKind, ObjectId

ROUTE = "/v1/node/take"
# What is offered in one message: whoever takes it answers when it has it.
_OFFERED_MAX = 256
_OFFERED_BYTES_MAX = 64 * MIB
_OFFER_TIMEOUT_S = 120.0
# Messages under way: the new owners share the link to this node.
_OFFERS_AT_ONCE = 4
# Passes over what could not be handed over: a node that was away, or a ring that changed meanwhile.
_PASSES_MAX = 3
_BETWEEN_PASSES_S = 2.0
# Blocks that are asked of the drained node in one request.
_PART_BYTES_MAX = 8 * MIB
log = logging.getLogger(__name__)


class HandoverParts(Protocol):
    """What this needs of the daemon."""

    blocks: BlockStore
    geometry: Geometry
    engine: Engine
    catalog: Catalog


@dataclass(slots=True)
class HandoverStatus:
    """How far it is; `left` are extents that no new owner could take."""

    extents_total: int = 0
    extents_done: int = 0
    bytes_done: int = 0
    left: int = 0
    is_over: bool = False

    def to_json(self) -> dict[str, Any]:
        """Return it with a line for people."""
        done = f"{self.extents_done} of {self.extents_total} extents handed over, {format_size(self.bytes_done)}"
        left = f"; {self.left} could not be: no room there, or no answer" if self.left and self.is_over else ""
        return {**dataclasses.asdict(self), "message": done + left}


@dataclass(frozen=True, slots=True)
class Offer:
    """One extent of this node: whole blocks of one version of an object."""

    object_id: ObjectId
    size_bytes: int
    extent_index: int
    blocks: tuple[int, ...]  # of the object; those that are here
    held_bytes: int

    def to_json(self) -> list[Any]:
        """Return what `offer_from_json` reads."""
        name = self.object_id
        return [name.store_id, name.key, name.version, self.size_bytes, self.extent_index, list(self.blocks)]


def offer_of_held(
    blocks: BlockStore, geometry: Geometry, object_id: ObjectId, size_bytes: int, extent_index: int
) -> Offer | None:
    """Return what this node holds of an extent; None if that is nothing."""
    start = extent_index * geometry.extent_size_bytes
    span = ByteRange(start, start + geometry.extent_length(size_bytes, extent_index))
    local = blocks.open_object(object_id.digest(), size_bytes)
    try:
        missing = set(local.missing_blocks(span))
    finally:
        local.close()
    held = tuple(block for block in geometry.blocks_of(span) if block not in missing)
    held_bytes = sum(geometry.block_range(size_bytes, block).length for block in held)
    return Offer(object_id, size_bytes, extent_index, held, held_bytes) if held else None


def offer_from_json(row: object, geometry: Geometry) -> Offer:
    """Return the offer in `row`, which another node sent. Raises UsageError."""
    match row:
        case [str(store_id), str(key), str(version), int(size_bytes), int(index), [*blocks]]:
            pass
        case _:
            raise UsageError("not an offer of an extent")
    if size_bytes < 1 or not 0 <= index < geometry.extent_count(size_bytes):
        raise UsageError("not an offer of an extent of that object")
    start = index * geometry.extent_size_bytes
    inside = geometry.blocks_of(ByteRange(start, start + geometry.extent_length(size_bytes, index)))
    offered = sorted({block for block in blocks if isinstance(block, int) and block in inside})
    if not offered or len(offered) != len(blocks):
        raise UsageError("an offer of blocks that are not in that extent")
    held = sum(geometry.block_range(size_bytes, block).length for block in offered)
    return Offer(ObjectId(store_id, key, version), size_bytes, index, tuple(offered), held)


class Handover:
    """Both sides of it. One event loop."""

    def __init__(self, cluster: ClusterNode, calls: NodeCalls, parts: HandoverParts, mark: Path) -> None:
        """`mark` is the file that says this node is drained; one that is there drains it from the start."""
        self._cluster = cluster
        self._calls = calls
        self._parts = parts
        self._mark = mark
        self._task: asyncio.Task[None] | None = None
        self._status: HandoverStatus | None = None
        if mark.exists():
            cluster.drain()

    @property
    def status(self) -> dict[str, Any] | None:
        """How far it is; None where this node is not drained."""
        return None if self._status is None else self._status.to_json()

    def start(self) -> None:
        """Be drained from now on, also over restarts, and hand over. Again: hand over what is left."""
        self._mark.touch()
        self._cluster.drain()
        self.resume()

    def resume(self) -> None:
        """Hand over, if this node is drained and is not at it."""
        if self._mark.exists() and (self._task is None or self._task.done()):
            self._status = HandoverStatus()
            self._task = asyncio.create_task(self._run(self._status), name="handover")

    async def undo(self) -> None:
        """Own a share again; what was handed over stays where it is, too."""
        self._mark.unlink(missing_ok=True)
        await self.close()
        self._status = None
        self._cluster.undrain()

    async def close(self) -> None:
        """Stop; the next daemon goes on."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    # -- the node that is drained ----------------------------------------------------------------------------------

    async def _run(self, status: HandoverStatus) -> None:
        try:
            for number in range(_PASSES_MAX):
                await asyncio.sleep(_BETWEEN_PASSES_S * bool(number))
                await self._pass(status)
                if not status.left and self._owners_known():
                    break
        except Exception:
            # The task's outermost frame: without this a bug would leave a node that drains for ever.
            log.exception("the handover failed")
            raise
        finally:
            status.is_over = True
        log.info("drained: %s", status.to_json()["message"])

    def _owners_known(self) -> bool:
        """Whether the ring is one without this node, so that what was offered went to those that own it now."""
        nodes = self._cluster.ring.nodes
        return bool(nodes) and all(node.node_id != self._cluster.node_id for node in nodes)

    async def _pass(self, status: HandoverStatus) -> None:
        """Offer everything once, what was taken before among it: who has it says so at no cost."""
        status.extents_total = status.extents_done = status.bytes_done = status.left = 0
        waiting: dict[str, list[Offer]] = {}
        free = asyncio.Semaphore(_OFFERS_AT_ONCE)
        async with asyncio.TaskGroup() as tasks:
            async for offer in self._offers():
                status.extents_total += 1
                owners = self._new_owners(offer)
                status.left += not owners
                for node in owners[:1]:
                    batch = waiting.setdefault(node.node_id, [])
                    batch.append(offer)
                    if len(batch) >= _OFFERED_MAX or sum(one.held_bytes for one in batch) >= _OFFERED_BYTES_MAX:
                        await free.acquire()
                        tasks.create_task(self._offer(node, waiting.pop(node.node_id), status, free))
            members = {member.node_id: member for member in self._cluster.members}
            for node_id, batch in waiting.items():
                await free.acquire()
                tasks.create_task(self._offer(members.get(node_id), batch, status, free))

    async def _offer(
        self, node: NodeRecord | None, batch: list[Offer], status: HandoverStatus, free: asyncio.Semaphore
    ) -> None:
        taken: object = []
        try:
            if node is not None:
                body = {"from": self._cluster.node_id, "extents": [offer.to_json() for offer in batch]}
                answer = await self._calls.ask(node, "POST", ROUTE, body, timeout_s=_OFFER_TIMEOUT_S)
                taken = answer.get("taken")
        except OrchestraError as error:
            log.warning("%d extents are not handed over: %s", len(batch), error)
        finally:
            free.release()
        is_taken = taken if isinstance(taken, list) else []
        for number, offer in enumerate(batch):
            if number < len(is_taken) and is_taken[number] is True:
                status.extents_done += 1
                status.bytes_done += offer.held_bytes
            else:
                status.left += 1

    def _new_owners(self, offer: Offer) -> list[NodeRecord]:
        ring = self._cluster.ring
        if not ring.nodes:
            return []
        members = {member.node_id: member for member in self._cluster.members}
        owners = ring.owners(extent_key(offer.object_id, offer.extent_index), 1)
        return [
            members[owner.node_id]
            for owner in owners
            if owner.node_id in members and owner.node_id != self._cluster.node_id
        ]

    async def _offers(self) -> AsyncIterator[Offer]:
        """Everything that this node holds of what is in the stores now."""
        for name, origin in self._parts.blocks.space.origins():
            if origin is not None and (offer := await self._offer_of(name, origin)) is not None:
                yield offer
            await asyncio.sleep(0)

    async def _offer_of(self, name: str, origin: Origin) -> Offer | None:
        mount = _mount_of(self._parts.engine.mounts, origin.store_id)
        if mount is None:
            return None
        try:
            entry = await self._parts.catalog.stat(mount.store, origin.key, float("inf"))
        except OrchestraError as error:
            log.info("%r is not handed over: %s", origin.key, error)
            return None
        if entry is None or entry.kind is not EntryKind.FILE:
            return None
        object_id = ObjectId(origin.store_id, origin.key, entry.version)
        digest, _, index = name.partition(".")
        if object_id.digest() != digest:  # of an older version
            return None
        return offer_of_held(self._parts.blocks, self._parts.geometry, object_id, entry.size_bytes, int(index or 0))

    # -- its new owners --------------------------------------------------------------------------------------------

    async def answer(self, body: Mapping[str, Any]) -> dict[str, Any]:
        """Return {taken: [whether this node has it now]} for {from, extents}. Raises UsageError."""
        sender, rows = body.get("from"), body.get("extents")
        if not isinstance(sender, str) or not isinstance(rows, list) or len(rows) > _OFFERED_MAX:
            raise UsageError(f"extents: expected a node and a list of at most {_OFFERED_MAX}")
        offers = [offer_from_json(row, self._parts.geometry) for row in rows]
        return {"taken": [await self.take(sender, offer) for offer in offers]}

    async def take(self, sender: str, offer: Offer) -> bool:
        """Get what this node lacks of the offer from the node that holds it; whether all of it is here now."""
        if _mount_of(self._parts.engine.mounts, offer.object_id.store_id) is None:
            return False
        geometry, blocks = self._parts.geometry, self._parts.blocks
        digest, size_bytes = offer.object_id.digest(), offer.size_bytes
        local = blocks.open_object(digest, size_bytes)
        try:
            first, last = offer.blocks[0], offer.blocks[-1]
            span = ByteRange(geometry.block_range(size_bytes, first).start, geometry.block_range(size_bytes, last).stop)
            missing = set(local.missing_blocks(span)).intersection(offer.blocks)
        finally:
            local.close()
        origin = Origin(offer.object_id.store_id, offer.object_id.key)
        for run in _runs(sorted(missing), max(1, _PART_BYTES_MAX // geometry.block_size_bytes)):
            if not blocks.admits(digest, size_bytes, run.start, origin):
                return False
            if not await self._pull(sender, offer, run):
                return False
        return True

    async def _pull(self, sender: str, offer: Offer, run: range) -> bool:
        geometry, size_bytes = self._parts.geometry, offer.size_bytes
        base = offer.extent_index * geometry.extent_size_bytes
        start = geometry.block_range(size_bytes, run.start).start
        stop = geometry.block_range(size_bytes, run.stop - 1).stop
        digest = offer.object_id.digest()
        part = ExtentPart(
            offer.object_id,
            digest,
            size_bytes,
            offer.extent_index,
            ByteRange(start - base, stop - base),
            priority=int(Priority.BACKGROUND),
            held_only=True,
        )
        data = await self._cluster.peers.read(part, [sender])
        if data is None:
            return False
        view, loop = memoryview(data), asyncio.get_running_loop()
        write, writers = self._parts.blocks.write_block, self._parts.engine.writers
        try:
            for block in run:
                place = geometry.block_range(size_bytes, block)
                piece = view[place.start - start : place.stop - start]
                await loop.run_in_executor(writers, write, digest, size_bytes, block, piece)
        except (CacheFullError, OSError) as error:
            log.warning("%r of node %s is not taken over: %s", offer.object_id.key, sender, error)
            return False
        return True


def _runs(blocks: list[int], count_max: int) -> list[range]:
    """Neighbouring blocks together, at most so many."""
    runs: list[range] = []
    for block in blocks:
        if runs and runs[-1].stop == block and len(runs[-1]) < count_max:
            runs[-1] = range(runs[-1].start, block + 1)
        else:
            runs.append(range(block, block + 1))
    return runs


def _mount_of(table: MountTable[OpenedMount], store_id: str) -> OpenedMount | None:
    return next((one for one in table if one.opened is not None and one.opened.store_id == store_id), None)
