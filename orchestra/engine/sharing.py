"""A miss in a cluster: which extents a part lies in, how many owners its mount asks for, whether this node keeps it.

Owns: turning what the engine wants into what the fetch stage asks other nodes for. Leaves to others: whom to ask, and
when to go to the store (fetch.shared).
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING

from orchestra.blocks.geometry import Geometry
from orchestra.blocks.store import BlockStore
from orchestra.cluster.peer_wire import ExtentPart
from orchestra.config import MountConfig
from orchestra.fetch.budget import Priority
from orchestra.fetch.shared import SharedFetcher, SharedPart
from orchestra.observe.stalls import Marks
from orchestra.values import ByteRange

if TYPE_CHECKING:
    from orchestra.engine.engine import Bringing, Wanted


# After a block that the disk did not take; then another one is tried.
_FULL_NS = 5_000_000_000


class ClusterSharing:
    """See engine.Sharing. One event loop."""

    def __init__(
        self,
        shared: SharedFetcher,
        blocks: BlockStore,
        geometry: Geometry,
        *,
        replicas: int,
        disk_errors: Callable[[], int],
    ) -> None:
        """`replicas` holds for mounts that do not say; `disk_errors` counts blocks that the disk did not take, because
        it is full or broken."""
        self._disk_errors = disk_errors
        self._errors_before = 0
        self._full_until_ns = 0
        self._shared = shared
        self._blocks = blocks
        self._geometry = geometry
        self._replicas = replicas

    def replicas_of(self, mount: MountConfig) -> int:
        """How many owners an extent of that mount has."""
        replication = mount.replication
        return self._replicas if replication is None or replication.min is None else replication.min

    def may_keep(self, digest: str, wanted: Wanted, block: int, *, is_asked_for: bool = False) -> bool:
        """See engine.Sharing: owners do; others where the mount allows passive copies, or for other nodes, in space
        that is free. A load finds out by itself whether the disk takes it: for it, no means that it has failed."""
        mount = wanted.mount.config
        extent = block // self._geometry.blocks_per_extent
        if not is_asked_for and self._is_disk_full():
            return False
        is_owner = self._shared.is_owner(digest, extent, self.replicas_of(mount))
        names = self._blocks.names_of(digest, wanted.info.size_bytes, range(block, block + 1))
        self._blocks.space.expect_copies(names, is_copy=not is_owner)
        # Other nodes ask one that is no owner to read through only where no owner can keep it.
        return is_owner or wanted.is_for_peer or mount.replication is None or mount.replication.passive

    def _is_disk_full(self) -> bool:
        """Whether the disk did not take a block a moment ago, with all that may leave gone: to fetch the next one would
        be to ask the store twice."""
        errors, now_ns = self._disk_errors(), self._shared.fetcher.stalls.now_ns()
        if errors != self._errors_before:
            self._errors_before = errors
            self._full_until_ns = now_ns + _FULL_NS
        return now_ns < self._full_until_ns

    def cut(self, parts: Iterable[range]) -> Iterator[range]:
        """See engine.Sharing."""
        for part in parts:
            for _, run in self._geometry.extents_of(part):
                yield run

    def part(
        self, digest: str, wanted: Wanted, blocks: range, priority: Priority, marks: Marks, *, is_kept: bool = True
    ) -> Bringing:
        """See engine.Sharing."""
        size = wanted.info.size_bytes
        start = self._geometry.block_range(size, blocks.start).start
        stop = self._geometry.block_range(size, blocks.stop - 1).stop
        index = blocks.start // self._geometry.blocks_per_extent
        first = index * self._geometry.extent_size_bytes
        wire = ExtentPart(
            wanted.object_id, digest, size, index, ByteRange(start - first, stop - first), priority=int(priority)
        )
        part = SharedPart(
            wanted.mount.store,
            wanted.info,
            wire,
            ByteRange(start, stop),
            self.replicas_of(wanted.mount.config),
            wanted.is_for_peer,
            is_kept,
        )
        return self._shared.part(part, priority, marks)

    def hasten(self, flight: asyncio.Future[bool], priority: Priority) -> None:
        """See engine.Sharing."""
        self._shared.between.hasten(flight, priority)
