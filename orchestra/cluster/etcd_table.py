"""A table that all nodes of a cluster have in common: the keys below one prefix of etcd, as this node knows them.

Owns: following the prefix, writing a row on the condition that it is as it was known. Leaves to others: what is in the
rows, requests (etcd_gateway). An etcd that is away leaves the table as it is; only changes wait for it.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

from orchestra.cluster.etcd import EtcdSettings
from orchestra.cluster.etcd_gateway import EtcdGateway, EtcdUnreachableError, WatchEvent

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Row:
    """A row; `revision` is that of its last change."""

    value: bytes
    revision: int


class EtcdTable:
    """Rows by name. One event loop. `changed` is called with all rows after each change, and after the first list."""

    def __init__(
        self,
        endpoints: Sequence[str],
        prefix: bytes,
        changed: Callable[[Mapping[bytes, Row]], None],
        settings: EtcdSettings | None = None,
    ) -> None:
        self._settings = EtcdSettings() if settings is None else settings
        self._prefix = prefix
        self._changed = changed
        # Two, as the driver has: a watch must not hold up a change.
        self._watching = EtcdGateway(endpoints, timeout_s=self._settings.timeout_s)
        self._writing = EtcdGateway(endpoints, timeout_s=self._settings.timeout_s)
        self._rows: dict[bytes, Row] = {}
        self._is_lost = False

    @property
    def rows(self) -> Mapping[bytes, Row]:
        """The rows as they were last seen."""
        return MappingProxyType(self._rows)

    async def run(self) -> None:
        """Follow the prefix until cancelled."""
        while True:
            try:
                listing = await self._watching.list(self._prefix)
                self._rows = {self._name(kv.key): Row(kv.value, kv.mod_revision) for kv in listing.found}
                self._is_lost = False
                self._changed(self.rows)
                async for _, events in self._watching.watch(self._prefix, listing.revision + 1):
                    self._take(events)
            except EtcdUnreachableError as error:
                if not self._is_lost:
                    log.warning("%s; what is below %s stays as it was known", error, self._prefix.decode())
                self._is_lost = True
            await asyncio.sleep(self._settings.again_s)

    async def put(self, name: bytes, value: bytes) -> bool:
        """Write a row if it is as this node knows it (or absent, as it knows); False if it is not. Raises
        EtcdUnreachableError; the row may have been written then."""
        known = self._rows.get(name)
        revision = await self._writing.put_if_unchanged(self._prefix + name, value, "0", known.revision if known else 0)
        if revision is None:
            return False
        self._rows[name] = Row(value, revision)
        self._changed(self.rows)
        return True

    async def delete(self, name: bytes) -> bool:
        """Remove a row if it is as this node knows it; False if it is not. Raises as `put` does."""
        known = self._rows.get(name)
        if known is None or not await self._writing.delete_if_unchanged(self._prefix + name, known.revision):
            return False
        if self._rows.get(name) == known:
            del self._rows[name]
            self._changed(self.rows)
        return True

    async def close(self) -> None:
        """Close connections."""
        await self._watching.close()
        await self._writing.close()

    def _take(self, events: Sequence[WatchEvent]) -> None:
        for event in events:
            name = self._name(event.kv.key)
            known = self._rows.get(name)
            if known is not None and known.revision >= event.kv.mod_revision:
                continue  # a change of this node's own, or one that is older
            if event.is_deletion:
                self._rows.pop(name, None)
            else:
                self._rows[name] = Row(event.kv.value, event.kv.mod_revision)
        self._changed(self.rows)

    def _name(self, key: bytes) -> bytes:
        return key[len(self._prefix) :]
