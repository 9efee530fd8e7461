"""Blocks that came with other bytes than they should have: the node that sent them is told, and looks at its own disk.

Owns: telling and looking, both bounded. Leaves to others: what a reader gets instead (cluster.peers, fetch.shared),
checking a file (blocks).

Who is told believes nothing: a network that changes bytes makes all nodes doubt one another, and no good block leaves a
disk for that. It costs one look at an extent a minute for each that is doubted.
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from orchestra.clock import Clock
from orchestra.cluster.peer_wire import ExtentPart, PeerError, parse_part
from orchestra.daemon.cluster import ClusterNode
from orchestra.daemon.nodes.calls import NodeCalls
from orchestra.daemon.peers import PeerService
from orchestra.errors import OrchestraError, UsageError
from orchestra.fetch.budget import Priority

log = logging.getLogger(__name__)

ROUTE = "/v1/node/doubt"
# An extent is not told of, nor looked at, again before.
_AGAIN_NS = 60_000_000_000
_WAITING_MAX = 256
_REMEMBERED_MAX = 4096
# A network that changes bytes makes all nodes doubt everything.
_WARN_EVERY_NS = 10_000_000_000
# A look reads an extent of 64 MiB from a disk that others use, and fetches it anew if it is bad.
_LOOK_TIMEOUT_S = 30.0


@dataclass(slots=True)
class DoubtCounts:
    """Counts since the start."""

    told: int = 0  # other nodes, of what came from them
    lost: int = 0  # they did not answer, or too much was to be told
    looked: int = 0  # at an extent of this node, because another one doubted it
    damaged: int = 0  # blocks that were bad here


class _Lately:
    """What happened within the last minute, bounded."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._at_ns: OrderedDict[tuple[str, str, int], int] = OrderedDict()

    def is_new(self, key: tuple[str, str, int]) -> bool:
        """Whether it did not happen lately; it did from now on."""
        now_ns = self._clock.now_ns()
        before_ns = self._at_ns.get(key)
        if before_ns is not None and now_ns - before_ns < _AGAIN_NS:
            return False
        self._at_ns[key] = now_ns
        self._at_ns.move_to_end(key)
        if len(self._at_ns) > _REMEMBERED_MAX:
            self._at_ns.popitem(last=False)
        return True


class Doubts:
    """Both sides of it. One event loop."""

    def __init__(self, cluster: ClusterNode, calls: NodeCalls, service: PeerService, clock: Clock) -> None:
        self._cluster = cluster
        self._calls = calls
        self._service = service
        self._clock = clock
        self._warned_ns = -_WARN_EVERY_NS
        self._told = _Lately(clock)
        self._looked = _Lately(clock)
        self._waiting: asyncio.Queue[tuple[str, ExtentPart]] = asyncio.Queue(_WAITING_MAX)
        self._looking = asyncio.Lock()
        self.counts = DoubtCounts()

    def status(self) -> dict[str, int]:
        """Return the counts."""
        return asdict(self.counts)

    # -- who received them -------------------------------------------------------------------------------------------

    def tell(self, node_id: str, part: ExtentPart) -> None:
        """Tell that node, soon, that this part came from it with other bytes than it should have."""
        if self._waiting.full():
            self.counts.lost += 1
        elif self._told.is_new((node_id, part.digest, part.extent_index)):
            self._waiting.put_nowait((node_id, dataclasses.replace(part, held_only=False)))

    async def run(self) -> None:
        """Tell until cancelled."""
        while True:
            node_id, part = await self._waiting.get()
            node = next((member for member in self._cluster.members if member.node_id == node_id), None)
            line = f"{part.target} {part.range_header}"
            try:
                if node is None:
                    raise OrchestraError(f"node {node_id} is not in the cluster any more")
                await self._calls.ask(node, "POST", ROUTE, {"part": line}, timeout_s=_LOOK_TIMEOUT_S)
                self.counts.told += 1
            except OrchestraError as error:
                log.info("a node was not told of bytes that are not the object's: %s", error)
                self.counts.lost += 1

    # -- who sent them -----------------------------------------------------------------------------------------------

    async def answer(self, body: Mapping[str, Any]) -> dict[str, Any]:
        """Look at the part in {part}; return {damaged: how many blocks were bad}. Raises UsageError."""
        try:
            part = parse_part(*str(body.get("part")).split(" "))
        except (ValueError, TypeError) as error:
            raise UsageError(f"part: {error}") from error
        async with self._looking:  # one at a time: it costs the disk that readers wait for
            if not self._looked.is_new(("", part.digest, part.extent_index)):
                return {"damaged": 0}
            self.counts.looked += 1
            part = dataclasses.replace(part, priority=int(Priority.BACKGROUND))
            try:
                damaged = await self._service.look_at(part)
                if damaged:
                    self.counts.damaged += damaged
                    (await self._service.bring(part)).close()
            except PeerError as error:
                raise UsageError(f"{part.object_id.key!r}: {error}") from error
        if damaged == 0:
            self._warn(part)
        return {"damaged": damaged or 0}

    def _warn(self, part: ExtentPart) -> None:
        now_ns = self._clock.now_ns()
        if now_ns >= self._warned_ns + _WARN_EVERY_NS:
            self._warned_ns = now_ns
            log.warning(
                "%r: another node got other bytes of extent %d than are here, where they are right: the network between"
                " the nodes changes bytes",
                *(part.object_id.key, part.extent_index),
            )
