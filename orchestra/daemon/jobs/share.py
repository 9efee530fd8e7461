"""Which bytes of each file one node loads, when all nodes of a cluster load a tree together. Pure.

Owns: cutting a file to the extents that the node owns, and which node counts it. Leaves to others: owners (ring),
loading.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from orchestra.blocks.geometry import Geometry
from orchestra.cluster.ring import Ring, digest_key, extent_key
from orchestra.config import MountConfig
from orchestra.prefetch.tree import TreeFile
from orchestra.values import ByteRange


@dataclass(frozen=True, slots=True)
class Share:
    """The part of one node by one ring. All nodes of the ring together have every extent as often as `replicas_of` its
    mount says (or as there are nodes); each file is counted by one of them."""

    ring: Ring
    node_id: str
    geometry: Geometry
    replicas_of: Callable[[MountConfig], int]

    def of(self, file: TreeFile) -> list[TreeFile]:
        """Return the extents of the file that are this node's to load; an empty file is its first owner's."""
        size = file.wanted.info.size_bytes
        replicas = self.replicas_of(file.wanted.mount.config) if size else 1
        count, step = max(1, self.geometry.extent_count(size)), self.geometry.extent_size_bytes
        runs: list[ByteRange] = []
        digest = file.wanted.digest
        for index in range(count):
            owners = self.ring.owners(digest_key(digest, index), replicas)
            if all(owner.node_id != self.node_id for owner in owners):
                continue
            runs.append(ByteRange(index * step, min(size, (index + 1) * step)))
        return [TreeFile(file.path, replace(file.wanted, byte_range=run)) for run in runs]

    def counts(self, file: TreeFile) -> bool:
        """Whether this run of a file stands for the file in the count of files."""
        if file.wanted.byte_range.start:
            return False
        return self.ring.owners(extent_key(file.wanted.object_id, 0), 1)[0].node_id == self.node_id
