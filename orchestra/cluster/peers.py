"""The other nodes: whom to ask, in which order, and what each failure costs.

Owns: a client for each node that membership names, the time for which a broken one is left alone, the counts by cause.
Leaves to others: who owns what (ring), requests (peer_client), what comes after the last peer (fetch).
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

from orchestra.clock import Clock
from orchestra.cluster.peer_batch import Heard, Prove
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
# An answer that takes longer than 95 of 100 before it did is hedged; of a node that is not known yet, after the longest
# time that a reader would not notice, and never before the time of one loaded turn of its loop.
_TIMES_KEPT = 64
_PATIENCE_UNKNOWN_S = 0.1
_PATIENCE_MIN_S = 0.02
_LATE_MAX = 64
# A node that had no room for a block is taken to have none for others either, for so long.
_FULL_S = 5.0


@dataclass(slots=True)
class PeerCounts:
    """What was asked of one node since it was first known."""

    requests: int = 0
    bytes_received: int = 0
    skipped: int = 0  # left alone after a failure
    hedged: int = 0  # it took so long that the next owner was asked as well
    failures: dict[str, int] = field(default_factory=dict)  # by cause


@dataclass(slots=True)
class _Peer:
    record: NodeRecord
    client: PeerClient
    counts: PeerCounts
    paused_until_s: float = 0.0
    full_until_s: float = 0.0
    pause_s: float = 0.0
    took_s: deque[float] = field(default_factory=lambda: deque(maxlen=_TIMES_KEPT))


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
        # Told who else holds what came, by places in the ring's order.
        self.heard: Heard = lambda part, places: None
        # Told of a part that came from that node with other bytes than it should have.
        self.doubted: Callable[[str, ExtentPart], None] = lambda node_id, part: None
        self._clock = clock
        self._signer = signer
        self._receivers = Receivers()
        self._late: set[asyncio.Task[Buffer | None]] = set()  # whose answer came from somebody else
        self._make_client = partial(
            PeerClient,
            receivers=self._receivers,
            block_size_bytes=block_size_bytes,
            connect_timeout_s=connect_timeout_s,
            stall_timeout_s=stall_timeout_s,
            heard=lambda part, places: self.heard(part, places),
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
        for task in list(self._late):
            task.cancel()
        for node_id in list(self._peers):
            self.disconnect(node_id)
        self._receivers.close()

    def counts(self) -> dict[str, PeerCounts]:
        """What was asked of whom, by node."""
        return self._counts

    def knows(self, node_id: str) -> bool:
        """Whether that node can be asked at all."""
        return node_id in self._peers

    def is_no_keeper(self, node_id: str) -> bool:
        """Whether that node keeps nothing now: it is not there, is left alone, or had no room a moment ago."""
        peer, now_s = self._peers.get(node_id), self._now_s()
        return peer is None or now_s < max(peer.paused_until_s, peer.full_until_s)

    async def read(self, part: ExtentPart, node_ids: Sequence[str]) -> Buffer | None:
        """Return those bytes from the first of these nodes that gives them; None if none does, each for a counted
        cause. Where a reader waits and a node takes longer than it nearly always does, the next one is asked as well
        for what it holds."""
        for at, node_id in enumerate(node_ids):
            peer = self._usable(node_id)
            if peer is None:
                continue
            second = None if part.priority or part.held_only else self._second(node_ids[at + 1 :])
            data = await (self._ask(peer, part) if second is None else self._ask_hedged(peer, second, part))
            if data is not None:
                return data
        return None

    async def read_copy(self, part: ExtentPart, node_id: str, owners: Sequence[str]) -> Buffer | None:
        """Return those bytes if that node holds them; where a reader waits and it takes long, an owner is asked for
        what it holds, too."""
        peer, held = self._usable(node_id), replace(part, held_only=True)
        if peer is None:
            return None
        second = None if part.priority else self._second([owner for owner in owners if owner != node_id])
        return await (self._ask(peer, held) if second is None else self._ask_hedged(peer, second, held))

    def _usable(self, node_id: str) -> _Peer | None:
        peer = self._peers.get(node_id)
        if peer is not None and self._now_s() < peer.paused_until_s:
            peer.counts.skipped += 1
            return None
        return peer

    def _second(self, node_ids: Sequence[str]) -> _Peer | None:
        peers = (self._peers.get(node_id) for node_id in node_ids)
        return next((peer for peer in peers if peer is not None and self._now_s() >= peer.paused_until_s), None)

    async def _ask(self, peer: _Peer, part: ExtentPart) -> Buffer | None:
        peer.counts.requests += 1
        began_s = self._now_s()
        try:
            data = await peer.client.fetch(part)
        except PeerError as error:
            self._failed(peer, error)
            if error.cause is Cause.CHECKSUM:
                self.doubted(peer.record.node_id, part)
            return None
        peer.took_s.append(self._now_s() - began_s)
        peer.counts.bytes_received += len(data)
        peer.pause_s = 0.0
        return data

    async def _ask_hedged(self, peer: _Peer, second: _Peer, part: ExtentPart) -> Buffer | None:
        """Ask `peer`, and `second` too if that takes long; the first answer with bytes counts."""
        asked = {asyncio.create_task(self._ask(peer, part))}
        try:
            if not (await asyncio.wait(asked, timeout=_patience_s(peer.took_s)))[0]:
                peer.counts.hedged += 1
                asked.add(asyncio.create_task(self._ask(second, replace(part, held_only=True))))
            while asked:
                done, asked = await asyncio.wait(asked, return_when=asyncio.FIRST_COMPLETED)
                for answer in done:
                    data = answer.result()
                    if data is not None:
                        return data
            return None
        except asyncio.CancelledError:
            for task in asked:
                task.cancel()
            raise
        finally:
            # Not cancelled: a node that hangs is found out by its timeout, and left alone then.
            self._late |= asked
            for task in asked:
                task.add_done_callback(self._late.discard)
            if len(self._late) > _LATE_MAX:
                self._late.pop().cancel()

    def _failed(self, peer: _Peer, error: PeerError) -> None:
        cause = error.cause
        peer.counts.failures[cause] = peer.counts.failures.get(cause, 0) + 1
        if cause is Cause.NOT_KEPT:
            peer.full_until_s = self._now_s() + _FULL_S
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


def _patience_s(took_s: Sequence[float]) -> float:
    if len(took_s) < _TIMES_KEPT // 4:
        return _PATIENCE_UNKNOWN_S
    return max(_PATIENCE_MIN_S, sorted(took_s)[int(len(took_s) * 0.95)])


def _headers(
    signer: ProofSigner, node_id: str, method: str, target: str, range_header: str, body: bytes
) -> dict[str, str]:
    return signer.headers(method, target, node_id, byte_range=range_header, body=body)
