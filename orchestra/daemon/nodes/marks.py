"""What a daemon finds on its disk when it starts: which of it are copies of what other nodes own.

Owns: saying so to the block store once the ring is known, and again while the ring of the start fills up. Leaves to
others: what being a copy means (blocks.copies), marks of what comes later (engine.sharing).

Nothing of this is on disk: who owns an extent follows from the ring of now, which may not be that of before.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence

from orchestra.blocks.rules import Origin
from orchestra.blocks.store import BlockStore
from orchestra.clock import Clock
from orchestra.cluster.ring import Ring, digest_key
from orchestra.config import MountConfig
from orchestra.daemon.cluster import ClusterNode
from orchestra.engine.engine import Engine

_LOOK_EVERY_S = 1.0
# A node that lists addresses finds the others within seconds; a cluster that is started anew is whole by then, too.
_FOLLOWED_NS = 600 * 1_000_000_000
# A look-up costs 5 to 40 us, and readers wait meanwhile.
_AT_ONCE = 200


class CopyMarks:
    """One event loop."""

    def __init__(
        self,
        cluster: ClusterNode,
        blocks: BlockStore,
        engine: Engine,
        clock: Clock,
        replicas_of: Callable[[MountConfig], int],
        learn: Callable[[], Awaitable[None]],
    ) -> None:
        """`replicas_of` tells how many owners an extent of a mount has; `learn` finds out whose the extents are where a
        crash lost that."""
        self._cluster = cluster
        self._blocks = blocks
        self._engine = engine
        self._clock = clock
        self._replicas_of = replicas_of
        self._learn = learn
        self._marked = 0

    def status(self) -> dict[str, int]:
        """Return how many extents were found to be copies, by the last ring that was looked at."""
        return {"copies_found": self._marked}

    async def run(self) -> None:
        """Mark what is there now by each ring of the next minutes."""
        await self._learn()
        found = self._blocks.space.origins()
        done, until_ns = "", self._clock.now_ns() + _FOLLOWED_NS
        while found and self._clock.now_ns() < until_ns:
            ring = self._cluster.ring
            if ring.digest != done and any(node.node_id == self._cluster.node_id for node in ring.nodes):
                done = ring.digest
                await self._mark(found, ring)
            await asyncio.sleep(_LOOK_EVERY_S)

    async def _mark(self, found: Sequence[tuple[str, Origin | None]], ring: Ring) -> None:
        replicas = {
            mount.opened.store_id: self._replicas_of(mount.config)
            for mount in self._engine.mounts
            if mount.opened is not None
        }
        marked = 0
        for first in range(0, len(found), _AT_ONCE):
            marks: dict[str, bool] = {}
            for name, origin in found[first : first + _AT_ONCE]:
                if origin is None or origin.store_id not in replicas:
                    continue
                digest, _, index = name.partition(".")
                owners = ring.owners(digest_key(digest, int(index or 0)), replicas[origin.store_id])
                marks[name] = all(node.node_id != self._cluster.node_id for node in owners)
            marked += self._blocks.space.mark_copies(marks)
            await asyncio.sleep(0)
        self._marked = marked
