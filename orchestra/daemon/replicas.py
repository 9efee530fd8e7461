"""Copies for the other owners: what this node read from the store as first owner, it has them fetch from it.

Owns: telling them, and fetching what this node is told, behind everything else. Leaves to others: who owns what (the
ring), the fetch itself (engine).

Nobody waits for a copy, and what is lost on the way (a queue that is full, a node that does not answer) costs a read of
the store after the first owner died, no more: so nothing here is repeated.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from orchestra.cluster.peer_wire import ExtentPart, PeerError, parse_part
from orchestra.daemon.cluster import ClusterNode
from orchestra.daemon.nodes.calls import NodeCalls
from orchestra.daemon.peers import PeerService
from orchestra.errors import OrchestraError, UsageError
from orchestra.fetch.budget import Priority

log = logging.getLogger(__name__)

ROUTE = "/v1/peer/keep"
# To one node, and from all: some seconds of a load of small files. 300 bytes each.
WAITING_MAX = 16_384
# Told at once; a line is a key of at most 3 KiB, percent-encoded.
_TOLD_AT_ONCE = 256
# Fetched at once: small objects share requests (256 in one), large ones are bounded by the bytes in flight.
_FETCHED_AT_ONCE = 64


@dataclass(slots=True)
class ReplicaCounts:
    """Counts of parts since the start."""

    offered: int = 0  # read from the store while other owners lacked them
    told: int = 0
    lost: int = 0  # never told, or told and never fetched
    kept: int = 0  # fetched here, or here already
    refused: int = 0  # no room here


class Replicas:
    """One event loop."""

    def __init__(self, cluster: ClusterNode, service: PeerService) -> None:
        self._cluster = cluster
        self._service = service
        self._calls = NodeCalls(cluster)
        self._to_tell: dict[str, deque[str]] = {}
        self._to_fetch: deque[ExtentPart] = deque()
        self._is_new = asyncio.Event()
        self._is_told = asyncio.Event()
        self.counts = ReplicaCounts()

    def status(self) -> dict[str, int]:
        """Return the counts, and how many parts wait to be fetched."""
        return {**asdict(self.counts), "waiting": len(self._to_fetch)}

    def offer(self, part: ExtentPart, node_ids: Sequence[str]) -> None:
        """Have these nodes fetch that part, which this one read from the store."""
        line = f"{part.target} {part.range_header}"
        for node_id in node_ids:
            self.counts.offered += 1
            waiting = self._to_tell.setdefault(node_id, deque())
            if len(waiting) >= WAITING_MAX:
                self.counts.lost += 1
                continue
            waiting.append(line)
        self._is_new.set()

    def take(self, lines: Sequence[object]) -> None:
        """Fetch these parts when there is nothing better to do. Raises UsageError for what is none."""
        try:
            parts = [parse_part(*str(line).split(" ")) for line in lines]
        except (ValueError, TypeError) as error:
            raise UsageError(f"{ROUTE}: {error}") from error
        for part in parts:
            if len(self._to_fetch) >= WAITING_MAX:
                self.counts.lost += 1
            else:
                self._to_fetch.append(part)
        self._is_told.set()

    async def run(self) -> None:
        """Tell and fetch until cancelled."""
        try:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self._tell())
                for _ in range(_FETCHED_AT_ONCE):
                    tasks.create_task(self._fetch())
        finally:
            await self._calls.close()

    async def _tell(self) -> None:
        while True:
            await self._is_new.wait()
            self._is_new.clear()
            while nodes := [node_id for node_id, waiting in self._to_tell.items() if waiting]:
                await asyncio.gather(*(self._tell_one(node_id) for node_id in nodes))

    async def _tell_one(self, node_id: str) -> None:
        waiting = self._to_tell[node_id]
        lines = [waiting.popleft() for _ in range(min(_TOLD_AT_ONCE, len(waiting)))]
        record = next((record for record in self._cluster.members if record.node_id == node_id), None)
        try:
            if record is not None:
                await self._calls.ask(record, "POST", ROUTE, {"parts": lines})
                self.counts.told += len(lines)
                return
        except OrchestraError as error:
            log.debug("node %s was not told of its copies: %s", node_id, error)
        self.counts.lost += len(lines) + len(waiting)
        waiting.clear()  # gone or too busy: it fetches when somebody asks it

    async def _fetch(self) -> None:
        while True:
            while not self._to_fetch:
                self._is_told.clear()
                await self._is_told.wait()
            part = self._to_fetch.popleft()
            try:
                is_kept = await self._service.ensure(part, Priority.BACKGROUND)
            except (PeerError, OrchestraError) as error:
                log.debug("a copy was not fetched: %s", error)
                self.counts.lost += 1
                continue
            if is_kept:
                self.counts.kept += 1
            else:
                self.counts.refused += 1
