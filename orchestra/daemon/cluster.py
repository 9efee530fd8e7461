"""This node's part in its cluster: who it is, which nodes there are, which of them own what.

Owns: the node's record, its secret, the ring and the records that membership publishes. Leaves to others: deciding them
(cluster.membership), what travels between nodes (cluster.peers), the port (api.between).
"""

from __future__ import annotations

import logging
import secrets
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any, Protocol

from orchestra.clock import Clock
from orchestra.cluster.drivers import make_driver
from orchestra.cluster.member import ClusterMember, News
from orchestra.cluster.membership import Connect, Disconnect, PublishRing
from orchestra.cluster.peers import Peers
from orchestra.cluster.proof import ProofChecker, ProofSigner, read_secret
from orchestra.cluster.records import NodeRecord
from orchestra.cluster.ring import Ring, digest_key, ring_of
from orchestra.config import ClusterConfig
from orchestra.daemon.peers import PeerService
from orchestra.fetch.shared import SharedFetcher

log = logging.getLogger(__name__)

# How long the owners of the ring before are asked for what they hold: a new owner of 800 GB at 1.25 GB/s takes so long
# to get it from them.
_EARLIER_NS = 600 * 1_000_000_000


def secret_of(cluster: ClusterConfig) -> bytes | None:
    """Return the cluster's secret, None where its settings name no file. Raises ConfigError, in one line, if the file
    is not fit to hold one."""
    return None if cluster.secret_file is None else read_secret(cluster.secret_file)


class Counts(Protocol):
    """What has numbers to show."""

    def status(self) -> dict[str, int]:
        """Return its counts."""
        ...


class KeepsCopies(Counts, Protocol):
    """What is told of copies; see daemon.replicas."""

    def take(self, lines: Sequence[object]) -> None:
        """Fetch these parts when there is nothing better to do. Raises UsageError."""
        ...

    async def run(self) -> None:
        """Tell others and fetch until cancelled."""
        ...


class ClusterNode:
    """One node of a cluster. One event loop; connects to nothing before `run`.

    A node's name is its address (`listen`), the same over restarts, and no two processes can have it; or `node_id`, for
    disks that outlive their addresses.
    """

    def __init__(
        self,
        cluster: ClusterConfig,
        secret: bytes | None,
        capacity_bytes: int,
        clock: Clock,
        *,
        block_size_bytes: int,
    ) -> None:
        self.config = cluster
        self._clock = clock
        node_id = cluster.node_id or cluster.listen
        record = NodeRecord(node_id, cluster.listen, capacity_bytes, instance=secrets.token_hex(8))
        # Without a secret all addresses are loopback, and requests carry and need no proof.
        self.signer = None if secret is None else ProofSigner(secret, record.node_id, clock)
        self.checker = None if secret is None else ProofChecker(secret, record.node_id, clock)
        self._first_record = record
        self.peers = Peers(clock, self.signer, block_size_bytes=block_size_bytes)
        self._before = Ring(0, ())
        self._earlier: tuple[Ring, ...] = ()
        self._earlier_until_ns = 0
        # Set by assembly, with what it joins.
        self.shared: SharedFetcher | None = None
        self.service: PeerService | None = None
        self.replicas: KeepsCopies | None = None
        self.hot: Counts | None = None
        self.doubts: Counts | None = None
        self.marks: Counts | None = None
        self.member = ClusterMember(record, make_driver(cluster, record, clock), clock, self._tell)

    @property
    def node_id(self) -> str:
        """This node's name."""
        return self._first_record.node_id

    @property
    def own(self) -> NodeRecord:
        """This node's record, as others get it."""
        return next((record for record in self.members if record.node_id == self.node_id), self._first_record)

    @property
    def ring(self) -> Ring:
        """The ring of now; without nodes before the first."""
        return self.member.membership.ring

    @property
    def members(self) -> tuple[NodeRecord, ...]:
        """The records of all nodes known now, by id; those that drain among them."""
        return self.member.membership.records

    def owners(self, digest: str, extent_index: int, replicas: int) -> tuple[str, ...]:
        """The extent's owners, the first one first; empty before there is a ring."""
        ring = self.ring
        if not ring.nodes:
            return ()
        return tuple(node.node_id for node in ring.owners(digest_key(digest, extent_index), replicas))

    def holders(self, digest: str, extent_index: int, replicas: int) -> tuple[str, ...]:
        """Other nodes that may hold the extent: owners now, and for some minutes after a change of the ring those of
        the ring before; at a node that has just started, who would own it if this one were not there."""
        owners = self.owners(digest, extent_index, replicas)
        if self._clock.now_ns() < self._earlier_until_ns:
            key = digest_key(digest, extent_index)
            owners += tuple(node.node_id for ring in self._earlier for node in ring.owners(key, replicas))
        return tuple(node for node in dict.fromkeys(owners) if node != self.node_id and self.peers.knows(node))

    def is_first_owner(self, digest: str, extent_index: int) -> bool:
        """Whether this node is the one that reads that extent from its store."""
        return self.owners(digest, extent_index, 1) == (self.node_id,)

    def status(self) -> dict[str, Any]:
        """Return who this node is, its ring and the nodes it knows, as `daemon status --json` shows them."""
        ring = self.ring
        return {
            "node_id": self.node_id,
            "membership": self.config.membership,
            "ring": {"revision": ring.revision, "digest": ring.digest, "nodes": len(ring.nodes)},
            "nodes": [asdict(record) for record in self.members],
            "source_error": self.member.membership.source_error,
            "replicas": {} if self.replicas is None else self.replicas.status(),
            "hot": {} if self.hot is None else self.hot.status(),
            "marks": {} if self.marks is None else self.marks.status(),
            "doubts": {} if self.doubts is None else self.doubts.status(),
            "shared": {} if self.shared is None else asdict(self.shared.statistics),
            "peers": {node_id: asdict(counts) for node_id, counts in self.peers.counts().items()},
        }

    async def run(self) -> None:
        """Take part until cancelled; then leave."""
        try:
            await self.member.run()
        finally:
            self.peers.close()

    def drain(self) -> None:
        """Own nothing new from now on; peers may go on reading."""
        self.member.drain()

    def undrain(self) -> None:
        """Own a share again."""
        self.member.undrain()

    def _remember(self, ring: Ring) -> None:
        """Note who owned what before `ring`."""
        others = ring_of(ring.revision, (node for node in ring.nodes if node.node_id != self.node_id))
        earlier = {
            known.digest: known for known in (self._before, others) if known.nodes and known.digest != ring.digest
        }
        self._earlier = tuple(earlier.values())
        self._earlier_until_ns = self._clock.now_ns() + _EARLIER_NS
        self._before = ring
        if self.shared is not None:
            self.shared.ring_changed()

    def _tell(self, news: News) -> None:
        if isinstance(news, Connect):
            if news.record.node_id != self.node_id:
                self.peers.connect(news.record)
        elif isinstance(news, Disconnect):
            self.peers.disconnect(news.node_id)
        elif isinstance(news, PublishRing):
            self._remember(news.ring)
            nodes = ", ".join(node.node_id for node in news.ring.nodes)
            log.info("ring %d (%s) of %d nodes: %s", news.ring.revision, news.ring.digest, len(news.ring.nodes), nodes)
