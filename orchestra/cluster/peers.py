"""The other nodes: whom to ask, in which order, and what each failure costs.

Owns: a client for each node that membership names, the time for which a broken one is left alone, the counts by cause.
Leaves to others: who owns what (ring), requests (peer_client), what comes after the last peer (fetch).
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import partial

from orchestra.clock import Clock
from orchestra.cluster.peer_batch import Prove
from orchestra.cluster.peer_client import CONNECT_TIMEOUT_S, STALL_TIMEOUT_S, PeerClient, no_proof
from orchestra.cluster.peer_socket import Receivers
from orchestra.cluster.peer_wire import BROKEN_CAUSES, Cause, ExtentPart, PeerError
from orchestra.cluster.proof import ProofSigner
from orchestra.cluster.records import NodeRecord
from orchestra.stores.contract import Buffer

log = logging.getLogger(__name__)

# A peer that failed is left alone for this long, doubled with every failure after that. Its ring neighbours notice its
# death within 9 s; a longer pause would outlast a short cut of the network.
PAUSE_MIN_S = 0.5
PAUSE_MAX_S = 30.0


@dataclass(slots=True)
class PeerCounts:
    """What was asked of one node since it was first known."""

    requests: int = 0
    bytes_received: int = 0
    skipped: int = 0  # left alone after a failure
    failures: dict[str, int] = field(default_factory=dict)  # by cause


@dataclass(slots=True)
class _Peer:
    record: NodeRecord
    client: PeerClient
    counts: PeerCounts
    paused_until_s: float = 0.0
    pause_s: float = 0.0


class Peers:
    """All other nodes. One event loop."""

    def __init__(
        self,
        clock: Clock,
        signer: ProofSigner | None,
        *,
        block_size_bytes: int,
        connect_timeout_s: float = CONNECT_TIMEOUT_S,
        stall_timeout_s: float = STALL_TIMEOUT_S,
    ) -> None:
        self._clock = clock
        self._signer = signer
        self._receivers = Receivers()
        self._make_client = partial(
            PeerClient,
            receivers=self._receivers,
            block_size_bytes=block_size_bytes,
            connect_timeout_s=connect_timeout_s,
            stall_timeout_s=stall_timeout_s,
        )
        self._peers: dict[str, _Peer] = {}
        self._counts: dict[str, PeerCounts] = {}

    def connect(self, record: NodeRecord) -> None:
        """Reach that node at its address from now on. Connections to an earlier incarnation are not used any more."""
        self.disconnect(record.node_id)
        client = self._make_client(record.address, self._prover(record.node_id))
        self._peers[record.node_id] = _Peer(record, client, self._counts.setdefault(record.node_id, PeerCounts()))

    def disconnect(self, node_id: str) -> None:
        """The node is gone; requests under way end by themselves."""
        peer = self._peers.pop(node_id, None)
        if peer is not None:
            peer.client.close_idle()

    def close(self) -> None:
        """Ask nobody any more."""
        for node_id in list(self._peers):
            self.disconnect(node_id)
        self._receivers.close()

    def counts(self) -> dict[str, PeerCounts]:
        """What was asked of whom, by node."""
        return self._counts

    def knows(self, node_id: str) -> bool:
        """Whether that node can be asked at all."""
        return node_id in self._peers

    async def read(self, part: ExtentPart, node_ids: Iterable[str]) -> Buffer | None:
        """Return those bytes from the first of these nodes that gives them; None if none does, each for a counted
        cause."""
        for node_id in node_ids:
            peer = self._peers.get(node_id)
            if peer is None:
                continue
            if self._now_s() < peer.paused_until_s:
                peer.counts.skipped += 1
                continue
            peer.counts.requests += 1
            try:
                data = await peer.client.fetch(part)
            except PeerError as error:
                self._failed(peer, error)
                continue
            peer.counts.bytes_received += len(data)
            peer.pause_s = 0.0
            return data
        return None

    def _failed(self, peer: _Peer, error: PeerError) -> None:
        cause = error.cause
        peer.counts.failures[cause] = peer.counts.failures.get(cause, 0) + 1
        if cause not in BROKEN_CAUSES:
            return
        if not peer.pause_s or cause is Cause.CHECKSUM:
            log.warning("node %s: %s (%s)", peer.record.node_id, error, cause)
        if self._now_s() >= peer.paused_until_s:  # else it failed for several requests at one moment
            peer.pause_s = min(PAUSE_MAX_S, max(PAUSE_MIN_S, peer.pause_s * 2))
            peer.paused_until_s = self._now_s() + peer.pause_s

    def _prover(self, node_id: str) -> Prove:
        return no_proof if self._signer is None else partial(_headers, self._signer, node_id)

    def _now_s(self) -> float:
        return self._clock.now_ns() / 1e9


def _headers(
    signer: ProofSigner, node_id: str, method: str, target: str, range_header: str, body: bytes
) -> dict[str, str]:
    return signer.headers(method, target, node_id, byte_range=range_header, body=body)
