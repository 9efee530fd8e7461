"""Which nodes hold what of an object.

Owns: the question of what a node holds, and gathering the answers. Leaves to others: what is on disk (blocks).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from orchestra.blocks.geometry import Geometry
from orchestra.blocks.store import BlockStore
from orchestra.cluster.records import NodeRecord
from orchestra.cluster.ring import extent_key
from orchestra.daemon.cluster import ClusterNode
from orchestra.daemon.nodes.calls import NodeCalls
from orchestra.engine.engine import Wanted
from orchestra.errors import OrchestraError, UsageError
from orchestra.values import ByteRange

ROUTE = "/v1/node/holds"
# Objects in one question; each costs the one who answers a look at a file.
OBJECTS_MAX = 1024


def held_by_extent(blocks: BlockStore, geometry: Geometry, digest: str, size_bytes: int) -> dict[int, int]:
    """Return the bytes of that object that are on this node's disk, by extent; extents without any are left out."""
    held: dict[int, int] = {}
    if not size_bytes:
        return held
    local = blocks.open_object(digest, size_bytes)
    try:
        missing = set(local.missing_blocks(ByteRange(0, size_bytes)))
    finally:
        local.close()
    for index, run in geometry.extents_of(range(geometry.block_count(size_bytes))):
        here = sum(geometry.block_range(size_bytes, block).length for block in run if block not in missing)
        if here:
            held[index] = here
    return held


def answer_holds(
    blocks: BlockStore, geometry: Geometry, body: Mapping[str, Any], kept: Callable[[str], list[int]]
) -> dict[str, Any]:
    """Return {held: [{extent: bytes}], hot: [[extent]]} for {objects: [[digest, size_bytes]]}, which another node sent;
    `kept` tells which extents of an object are hot copies. Raises UsageError."""
    objects = body.get("objects")
    if not isinstance(objects, list) or len(objects) > OBJECTS_MAX:
        raise UsageError(f"objects: expected a list of at most {OBJECTS_MAX}")
    held, hot = [], []
    for one in objects:
        match one:
            case [str(digest), int(size_bytes)] if is_digest(digest) and size_bytes >= 0:
                held.append(held_by_extent(blocks, geometry, digest, size_bytes))
                hot.append(kept(digest))
            case _:
                raise UsageError("objects: expected [digest, size_bytes]")
    return {"held": [{str(index): count for index, count in one.items()} for one in held], "hot": hot}


def is_digest(text: str) -> bool:
    """Whether `text` can name an object in the cache directory: nothing else may become part of a path."""
    return len(text) == 32 and all(character in "0123456789abcdef" for character in text)


class Presence:
    """Asks all nodes what they hold."""

    def __init__(
        self,
        cluster: ClusterNode,
        calls: NodeCalls,
        blocks: BlockStore,
        geometry: Geometry,
        kept: Callable[[str], list[int]],
    ) -> None:
        """`kept` tells which extents of an object this node was asked to keep because they are read so often."""
        self._cluster = cluster
        self._kept = kept
        self._calls = calls
        self._blocks = blocks
        self._geometry = geometry

    async def where(self, wanted: Wanted, replicas: int) -> dict[str, Any]:
        """Return {nodes: [{node_id, held_bytes, hot_bytes, owns_bytes, error}]} of the wanted object: what each node
        holds, how much of that because it is read so often, and what should be there by the ring with so many
        `replicas`."""
        digest, size_bytes = wanted.digest, wanted.info.size_bytes

        async def ask(node: NodeRecord) -> tuple[int, int]:
            body = {"objects": [[digest, size_bytes]]}
            if node.node_id == self._cluster.node_id:
                return _totals(answer_holds(self._blocks, self._geometry, body, self._kept))
            return _totals(await self._calls.ask(node, "POST", ROUTE, body))

        members = self._cluster.members
        answers: Sequence[tuple[int, int] | OrchestraError] = await self._calls.ask_all(members, ask)
        owned = self._owned(wanted, replicas)
        return {
            "nodes": [
                {
                    "node_id": node.node_id,
                    "is_self": node.node_id == self._cluster.node_id,
                    "held_bytes": 0 if isinstance(answer, OrchestraError) else answer[0],
                    "hot_bytes": 0 if isinstance(answer, OrchestraError) else answer[1],
                    "owns_bytes": owned.get(node.node_id, 0),
                    "error": str(answer) if isinstance(answer, OrchestraError) else "",
                }
                for node, answer in zip(members, answers, strict=True)
            ]
        }

    def _owned(self, wanted: Wanted, replicas: int) -> dict[str, int]:
        owned: dict[str, int] = {}
        size_bytes, ring = wanted.info.size_bytes, self._cluster.ring
        for index, _ in self._geometry.extents_of(self._geometry.blocks_of(wanted.byte_range)):
            for node in ring.owners(extent_key(wanted.object_id, index), replicas):
                length = self._geometry.extent_length(size_bytes, index)
                owned[node.node_id] = owned.get(node.node_id, 0) + length
        return owned


def _totals(answer: Mapping[str, Any]) -> tuple[int, int]:
    """Return the bytes held of the one object that was asked for, and those of them that are hot copies."""
    match answer:
        case {"held": [dict(held)], "hot": [[*hot]]}:
            counts = {str(index): count for index, count in held.items() if isinstance(count, int)}
            return sum(counts.values()), sum(counts.get(str(index), 0) for index in hot)
        case _:
            raise UsageError("another node's answer cannot be understood")
