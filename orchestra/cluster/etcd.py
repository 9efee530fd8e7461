"""The driver `etcd`: records under leases in an etcd that is there already, and a watch on them.

Owns: the keys, registration, which of etcd's answers is which event. Leaves to others: requests (etcd_gateway), when to
register and renew (membership).

A record stands at PREFIX + node id. Its incarnation is the revision that was read before it was written, and it is
written only if the key did not change since: so a later registration has a higher one, whoever wrote before.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace

from orchestra.clock import Clock
from orchestra.cluster.contract import Deliver, Errand
from orchestra.cluster.etcd_gateway import EtcdGateway, EtcdUnreachableError, KeyValue, WatchEvent
from orchestra.cluster.membership import (
    Announce,
    Changed,
    Joined,
    LeaseLost,
    Register,
    Renew,
    Renewed,
    Snapshot,
    SourceLost,
)
from orchestra.cluster.records import NodeRecord, encode_record, parse_record

PREFIX = b"/orchestra/v1/nodes/"
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class EtcdSettings:
    """`ttl_s` is how long a dead node stays on the ring; etcd's own least is 2."""

    ttl_s: int = 10
    timeout_s: float = 2.0  # of one call: two of them fit between two renewals
    again_s: float = 0.5  # between two tries while no endpoint answers


class EtcdDriver:
    """Speaks with the etcd at `endpoints`. A watch that ends, for whatever reason, is followed by a whole list."""

    has_lease = True

    def __init__(self, endpoints: Sequence[str], clock: Clock, settings: EtcdSettings | None = None) -> None:
        self._settings = EtcdSettings() if settings is None else settings
        self._clock = clock
        # Two: a list that takes its time must not hold up a renewal.
        self._watching = EtcdGateway(endpoints, timeout_s=self._settings.timeout_s)
        self._leasing = EtcdGateway(endpoints, timeout_s=self._settings.timeout_s)
        self._lease = ""

    async def run(self, deliver: Deliver) -> None:
        """See MembershipDriver."""
        while True:
            try:
                listing = await self._watching.list(PREFIX)
                records = tuple(record for kv in listing.found if (record := _record(kv)) is not None)
                deliver(Snapshot(listing.revision, records, listing.cluster_id))
                async for revision, events in self._watching.watch(PREFIX, listing.revision + 1):
                    deliver(_changed(revision, events))
            except EtcdUnreachableError as error:
                deliver(SourceLost(str(error)))
            await asyncio.sleep(self._settings.again_s)

    async def perform(self, errand: Errand, deliver: Deliver) -> None:
        """See MembershipDriver."""
        sent_at_s = self._clock.now_ns() / 1e9
        try:
            match errand:
                case Register(record):
                    await self._register(record, sent_at_s, deliver)
                case Renew(incarnation):
                    is_held = await self._leasing.keep_alive(self._lease)
                    deliver(Renewed(incarnation, sent_at_s) if is_held else LeaseLost(incarnation))
                case Announce(record):
                    await self._leasing.put_if_leased(_key(record.node_id), encode_record(record), self._lease)
        except EtcdUnreachableError as error:
            deliver(SourceLost(str(error)))

    async def close(self) -> None:
        """See MembershipDriver: the lease is revoked, so that others need not wait for its end."""
        if self._lease:
            try:
                await self._leasing.revoke(self._lease)
            except EtcdUnreachableError as error:
                _log.info("the node's lease could not be revoked and will expire: %s", error)
        await self._watching.close()
        await self._leasing.close()

    async def _register(self, record: NodeRecord, sent_at_s: float, deliver: Deliver) -> None:
        key = _key(record.node_id)
        lease, ttl_s = await self._leasing.grant(self._settings.ttl_s)
        incarnation, before = await self._leasing.get(key)
        value = encode_record(replace(record, incarnation=incarnation))
        revision = await self._leasing.put_if_unchanged(key, value, lease, 0 if before is None else before.mod_revision)
        if revision is not None:  # else another process registered between the two: asked again
            self._lease = lease
            deliver(Joined(incarnation, revision, float(ttl_s), sent_at_s))


def _key(node_id: str) -> bytes:
    return PREFIX + node_id.encode("ascii")


def _record(kv: KeyValue) -> NodeRecord | None:
    """Return the record at `kv`; None for what is none, on every node alike."""
    try:
        record = parse_record(kv.value)
        if _key(record.node_id) != kv.key:
            raise ValueError(f"it names the node {record.node_id}")
    except ValueError as error:
        _log.warning("etcd's key %r is left out: %s", kv.key[:300], error)
        return None
    return record


def _changed(revision: int, events: Sequence[WatchEvent]) -> Changed:
    seen: list[NodeRecord] = []
    lost: list[str] = []
    for event in events:
        record = None if event.is_deletion else _record(event.kv)
        if record is not None:
            seen.append(record)
        else:  # also a record that was overwritten with what is none
            lost.append(event.kv.key.removeprefix(PREFIX).decode("ascii", "replace"))
    return Changed(revision, tuple(seen), tuple(lost))
