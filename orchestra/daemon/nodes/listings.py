"""One LIST run per directory for the cluster: the owner of its key on the ring lists it, the others ask that node.

Owns: whose a listing is, asking for it and answering, what an owner that does not answer costs. Leaves to others:
listing and publishing (metadata.catalog), questions between nodes (calls).

A listing that takes long is waited for in short questions, so that an owner that is stopped costs seconds, however long
listings take.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Mapping
from typing import Any, Protocol

import aiohttp

from orchestra.clock import Clock, boot_id
from orchestra.cluster.records import NodeRecord
from orchestra.daemon.cluster import ClusterNode
from orchestra.daemon.nodes.calls import NodeCalls
from orchestra.engine.mounted import OpenedMount
from orchestra.errors import DaemonUnavailableError, NotFoundError, OrchestraError, UsageError
from orchestra.metadata.catalog import Catalog
from orchestra.metadata.reader import record_name
from orchestra.metadata.records import Record
from orchestra.namespace.mounts import MountTable
from orchestra.stores.contract import UnderStore

ROUTE = "/v1/node/listing"
AGE_HEADER = "orchestra-age-ns"
SINCE_HEADER = "orchestra-since-ns"
# The first owner and, while it does not answer, the next one.
_OWNERS = 2
# How long the owner has a question wait before it says that it is at work, and how much longer its silence is borne.
_HOLD_S = 1.0
_SILENT_S = 2.0
# Between the moment when a question came and the one when what it led to began.
_LOOP_STEP_S = 0.001
# An owner that did not answer is not asked again for so long; the membership lets go of a dead one within 10 s.
_PAUSE_S = 5.0
# A million names take 90 MB.
_LISTING_BYTES_MAX = 512 * 1024 * 1024
_THREAD_BYTES = 1024 * 1024
log = logging.getLogger(__name__)


class HasMounts(Protocol):
    """What knows the mounts of now."""

    @property
    def table(self) -> MountTable[OpenedMount]: ...


class PlacedListings:
    """See metadata.catalog.Elsewhere. One event loop."""

    def __init__(
        self, cluster: ClusterNode, calls: NodeCalls, catalog: Catalog, mounts: HasMounts, clock: Clock
    ) -> None:
        self._cluster = cluster
        self._calls = calls
        self._catalog = catalog
        self._mounts = mounts
        self._clock = clock
        self._paused_until_ns: dict[str, int] = {}

    # -- asking ----------------------------------------------------------------------------------------------------

    def lists(self, store_id: str, prefix: str) -> bool:
        """See Elsewhere."""
        return bool(self._others(store_id, prefix))

    async def listing(
        self, store_id: str, prefix: str, freshness_s: float, *, refresh: bool
    ) -> tuple[bytes, int] | None:
        """See Elsewhere."""
        for node in self._others(store_id, prefix):
            try:
                raw, fetched_ns = await self._ask(node, store_id, prefix, freshness_s, refresh)
                await _check(raw)
            except DaemonUnavailableError as error:
                self._paused_until_ns[node.node_id] = self._clock.now_ns() + int(_PAUSE_S * 1e9)
                log.warning("the listing of %r of %s is asked of another: %s", prefix or "/", store_id, error)
            except (OrchestraError, ValueError) as error:
                # No such mount there, no rights, no room: what is wrong there need not be wrong here.
                log.info("node %s cannot list %r of %s: %s", node.node_id, prefix or "/", store_id, error)
                return None
            else:
                return raw, fetched_ns
        return None

    def _others(self, store_id: str, prefix: str) -> list[NodeRecord]:
        """The nodes to ask, those before this one among the owners that are not paused; none: it is ours."""
        ring = self._cluster.ring
        if not ring.nodes:
            return []
        members = {member.node_id: member for member in self._cluster.members}
        others: list[NodeRecord] = []
        now_ns = self._clock.now_ns()
        for owner in ring.owners(f"l{record_name(store_id, prefix)}".encode(), _OWNERS):
            if owner.node_id == self._cluster.node_id:
                break
            if owner.node_id in members and self._paused_until_ns.get(owner.node_id, 0) <= now_ns:
                others.append(members[owner.node_id])
        return others

    async def _ask(
        self, node: NodeRecord, store_id: str, prefix: str, freshness_s: float, refresh: bool
    ) -> tuple[bytes, int]:
        """Return the record and since when it counts by this node's clock. Raises what the node answers,
        DaemonUnavailableError, ValueError."""
        body: dict[str, Any] = {"store": store_id, "prefix": prefix, "refresh": refresh}
        body["freshness_s"] = None if math.isinf(freshness_s) else freshness_s
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=1.0, sock_read=_HOLD_S + _SILENT_S)
        while True:
            asked_ns = self._clock.now_ns()
            headers, raw = await self._calls.ask_raw(
                node, "POST", ROUTE, body, timeout=timeout, bytes_max=_LISTING_BYTES_MAX
            )
            if not raw:  # it is under way since we asked first
                body.setdefault("since_ns", int(headers.get(SINCE_HEADER, "0")))
                continue
            age = headers.get(AGE_HEADER, "")
            if not (age.isascii() and age.isdigit() and len(age) < 20):
                raise ValueError("it does not say how old it is")
            # The age is as of when our question came, so it was fetched no earlier than this.
            return raw, asked_ns - int(age)

    # -- answering -------------------------------------------------------------------------------------------------

    async def answer(self, body: Mapping[str, Any]) -> tuple[memoryview, dict[str, str]]:
        """Return the listing that another node asks for, and headers that say its age as of now; b"" while it is under
        way: to be asked again, with what the header says. Raises UsageError, NotFoundError for a store that is not
        mounted here, and what listing raises."""
        match body:
            case {"store": str(store_id), "prefix": str(prefix), "refresh": bool(refresh)}:
                freshness = body.get("freshness_s")
            case _:
                raise UsageError("not a question for a listing")
        if freshness is not None and not (isinstance(freshness, (int, float)) and 0 < freshness < math.inf):
            raise UsageError("freshness_s: expected seconds above 0, or null")
        store = self._store(store_id)
        freshness_s = math.inf if freshness is None else float(freshness)
        came_ns = self._clock.now_ns()
        since_ns = body.get("since_ns", came_ns)
        if not isinstance(since_ns, int) or since_ns > came_ns:
            raise UsageError("since_ns: expected what was told")
        if refresh and since_ns < came_ns:  # asked again: what it led to when it was asked first will do
            refresh, freshness_s = False, (came_ns - since_ns) / 1e9 + _LOOP_STEP_S
        try:
            async with asyncio.timeout(_HOLD_S):
                record = await self._catalog.list_directory(
                    store, prefix, freshness_s, refresh=refresh, is_for_peer=True
                )
        except TimeoutError:  # the listing itself goes on
            return memoryview(b""), {SINCE_HEADER: str(since_ns)}
        age_ns = record.age_ns(boot_id=boot_id(), now_ns=came_ns)
        return record.raw, {AGE_HEADER: str(came_ns if age_ns is None else max(0, age_ns))}

    def _store(self, store_id: str) -> UnderStore:
        for mount in self._mounts.table:
            if mount.opened is not None and mount.opened.store_id == store_id:
                return mount.opened
        raise NotFoundError(f"node {self._cluster.node_id} has no mount of {store_id}")


async def _check(raw: bytes) -> None:
    """Raise ValueError for what is no listing."""
    if len(raw) > _THREAD_BYTES:
        await asyncio.to_thread(Record, memoryview(raw), (0, 0))
    else:
        Record(memoryview(raw), (0, 0))
