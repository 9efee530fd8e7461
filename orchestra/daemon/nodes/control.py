"""The control side of this node in its cluster: the parts that ask and answer other nodes, brought together.

Owns: which parts there are, and their life. Leaves to others: each part's doing, the routes (api.nodes, api.asked).
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any, Protocol

from orchestra.blocks.geometry import Geometry
from orchestra.blocks.layout import CacheLayout
from orchestra.blocks.store import BlockStore
from orchestra.clock import Clock
from orchestra.cluster.records import NodeRecord
from orchestra.config import MountConfig
from orchestra.daemon.cluster import ClusterNode
from orchestra.daemon.jobs.parts import PartRunner
from orchestra.daemon.jobs.runner import JobRunner
from orchestra.daemon.mounts import MountAdmin
from orchestra.daemon.nodes.calls import NodeCalls
from orchestra.daemon.nodes.doubts import Doubts
from orchestra.daemon.nodes.handover import Handover
from orchestra.daemon.nodes.hot import HotCopies
from orchestra.daemon.nodes.jobs import SharedJobs, suffix_of
from orchestra.daemon.nodes.listings import PlacedListings
from orchestra.daemon.nodes.loads import LeadLoads
from orchestra.daemon.nodes.marks import CopyMarks
from orchestra.daemon.nodes.mounts import SharedMounts
from orchestra.daemon.nodes.overview import Overview
from orchestra.daemon.nodes.presence import Presence
from orchestra.daemon.space import SpaceAdmin
from orchestra.engine.engine import Engine
from orchestra.errors import NotFoundError
from orchestra.metadata.catalog import Catalog

DRAIN_ROUTE = "/v1/node/drain"


class NodeParts(Protocol):
    """What a daemon without a cluster is made of, as far as it is asked for here."""

    layout: CacheLayout
    geometry: Geometry
    blocks: BlockStore
    mounts: MountAdmin
    jobs: JobRunner
    catalog: Catalog
    engine: Engine
    clock: Clock
    space: SpaceAdmin


class HasControl(Protocol):
    """A daemon's node."""

    nodes: NodeControl | None


class NodeControl:
    """What a daemon in a cluster has besides one that stands alone. One event loop."""

    def __init__(self, cluster: ClusterNode, parts: NodeParts) -> None:
        self.cluster = cluster
        self.blocks = blocks = parts.blocks
        self.geometry = geometry = parts.geometry
        self.calls = NodeCalls(cluster)
        self.overview = Overview(cluster, self.calls, self.status)
        endpoints = cluster.config.endpoints
        self.parts = PartRunner(parts.jobs.tools, parts.layout.tmp, cluster.node_id, self.replicas_of)
        self.loads = LeadLoads(cluster, self.calls, self.parts, parts.jobs.tools)
        parts.jobs.lead(self.loads.run, suffix_of(cluster.node_id))
        self.jobs = SharedJobs(cluster, self.calls, parts.jobs)
        self.loads.may_lead = self.jobs.may_lead
        self.handover = Handover(cluster, self.calls, parts, parts.layout.root / "drained")
        self.hot = HotCopies(cluster, self.calls, parts, self.handover, cluster.config.replicas)
        self.presence = Presence(cluster, self.calls, blocks, geometry, self.hot.kept)
        service, shared = cluster.service, cluster.shared
        assert service is not None and shared is not None, "assembly joined them"
        self.doubts = Doubts(cluster, self.calls, service, parts.clock)
        self.marks = CopyMarks(cluster, blocks, parts.engine, parts.clock, self.replicas_of, parts.space.adopt)
        cluster.hot, cluster.doubts, cluster.marks = self.hot, self.doubts, self.marks
        service.hot, shared.copies_of, cluster.peers.doubted = self.hot, self.hot.holders, self.doubts.tell
        self.listings = PlacedListings(cluster, self.calls, parts.catalog, parts.mounts, parts.clock)
        parts.catalog.elsewhere = self.listings
        kept = parts.layout.root / "cluster-mounts.json"
        self.mounts = SharedMounts(endpoints, parts.mounts, kept) if endpoints else None

    def replicas_of(self, mount: MountConfig) -> int:
        """How many owners an extent of that mount has."""
        replication = mount.replication
        least = None if replication is None else replication.min
        return self.cluster.config.replicas if least is None else least

    async def drain(self, name: str, *, undo: bool) -> dict[str, Any]:
        """Drain the node of that name ("": this one), or end that; return how far its handover is. Raises
        NotFoundError, DaemonUnavailableError."""
        node = self.member(name) if name else self.cluster.own
        if node.node_id != self.cluster.node_id:
            return await self.calls.ask(node, "POST", DRAIN_ROUTE, {"undo": undo})
        if undo:
            await self.handover.undo()
        else:
            self.handover.start()
        return {"node_id": node.node_id, "handover": self.handover.status}

    def status(self) -> dict[str, Any]:
        """Return how this node is, as it answers others."""
        return {
            "node_id": self.cluster.node_id,
            "ring_digest": self.cluster.ring.digest,
            "used_bytes": self.blocks.statistics().used_bytes,
            "handover": self.handover.status,
            "hot_copies": self.hot.status()["copies_here"],
        }

    def member(self, name: str) -> NodeRecord:
        """Return the node of that name or address. Raises NotFoundError that names those there are."""
        members = self.cluster.members
        for member in members:
            if name in (member.node_id, member.address):
                return member
        names = ", ".join(member.node_id for member in members) or "none"
        raise NotFoundError(f"there is no node {name!r} in the cluster now (nodes: {names})")

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Do what goes on by itself inside the block."""
        try:
            async with asyncio.TaskGroup() as tasks:
                self.handover.resume()
                running = [tasks.create_task(part.run()) for part in (self.jobs, self.hot, self.doubts, self.marks)]
                if self.mounts is not None:
                    running.append(tasks.create_task(self.mounts.run()))
                try:
                    yield
                finally:
                    for task in running:
                        task.cancel()
        finally:
            await self.handover.close()
            await self.parts.close()
            await self.calls.close()
            await self.jobs.close()
            if self.mounts is not None:
                await self.mounts.close()


@contextlib.asynccontextmanager
async def controlled(node: HasControl) -> AsyncIterator[None]:
    """Do what a node of a cluster does by itself inside the block; nothing where there is no cluster."""
    if node.nodes is None:
        yield
        return
    async with node.nodes.running():
        yield
