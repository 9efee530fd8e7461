"""The daemon's catalog: asks the stores, and publishes what they say as records.

Covers: when to ask (freshness), how (one HEAD or one LIST run), single flight, negative entries. Does not cover: which
store a path belongs to (namespace); answering from records (reader).

A lookup of one key asks for one key. But when a directory's listing has grown old and many of its keys are asked for,
one LIST run is cheaper than their HEADs: the ski-rental rule says to list again once the HEADs spent since equal the
requests that the listing took; this costs at most twice the best choice in hindsight.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import os
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Protocol

from orchestra.clock import Clock
from orchestra.errors import NotFoundError
from orchestra.metadata.reader import Known, MetadataReader, record_name, split_key
from orchestra.metadata.records import Record, RecordBuilder, RecordEntry, publish_record
from orchestra.stores.contract import UnderStore
from orchestra.values import EntryKind

log = logging.getLogger(__name__)

# HEADs in one directory after which it is listed in the background although nobody asked for its listing: a program
# that opens nine files of a folder by name will open more, and one LIST brings a thousand.
_HEADS_BEFORE_LISTING = 8
# A listing that took more requests than this runs beside the HEADs instead of being waited for.
_AWAITED_LIST_REQUESTS_MAX = 4
# Prefixes whose HEADs since their listing grew old are counted; forgetting one costs a few HEADs.
_COUNTED_PREFIXES_MAX = 4096


class Layout(Protocol):
    """Where records lie; the cache directory's layout."""

    def listing_file(self, name: str) -> str: ...

    def attr_file(self, name: str) -> str: ...


@dataclass(slots=True)
class MetadataStatistics:
    """Counts since the start."""

    stats_total: int = 0
    lists_total: int = 0
    heads_sent: int = 0
    list_runs: int = 0
    list_pages: int = 0


class Catalog:
    """Metadata of all stores of this node. One event loop."""

    def __init__(
        self,
        layout: Layout,
        temporary: str,
        reader: MetadataReader,
        *,
        clock: Clock,
        boot_id: bytes,
        is_shown_name: Callable[[bytes], bool],
    ) -> None:
        self._layout = layout
        self._temporary = temporary
        self._reader = reader
        self._clock = clock
        self._boot_id = boot_id
        self._is_shown_name = is_shown_name
        self._flights: dict[tuple[str, str, str], asyncio.Task[None]] = {}
        self._heads_since_old: OrderedDict[tuple[str, str], int] = OrderedDict()
        self._serial = itertools.count()
        self.statistics = MetadataStatistics()

    async def stat(
        self, store: UnderStore, key: str, freshness_s: float, *, refresh: bool = False
    ) -> RecordEntry | None:
        """Return the entry for `key`, no older than asked, or None if nothing is there; its record is published.

        `refresh` asks the store whatever is known, and does not join a question that was asked before.
        """
        self.statistics.stats_total += 1
        if not refresh:
            known = self._reader.lookup(store.store_id, key, freshness_s)
            if known is not None:
                return known.entry
        elif (flight := self._flights.get(("stat", store.store_id, key))) is not None:
            await asyncio.wait([flight])
        await self._once(("stat", store.store_id, key), lambda: self._ask_for_key(store, key, refresh=refresh))
        known = self._just_published(store, key)
        return known.entry if known is not None else None

    async def list_directory(
        self, store: UnderStore, prefix: str, freshness_s: float, *, refresh: bool = False
    ) -> Record:
        """Return the listing of `prefix`, no older than asked; it is published. An empty one says nothing is there."""
        self.statistics.lists_total += 1
        if not refresh:
            record = self._reader.listing(store.store_id, prefix, freshness_s)
            if record is not None:
                return record
        elif (flight := self._flights.get(("list", store.store_id, prefix))) is not None:
            await asyncio.wait([flight])
        await self._once(("list", store.store_id, prefix), lambda: self._ask_for_prefix(store, prefix))
        record = self._reader.any_listing(store.store_id, prefix)
        if record is None:
            raise OSError(f"the listing of {prefix!r} could not be written to the cache directory")
        return record

    def forget(self, store_id: str, key: str) -> None:
        """Drop what is known about `key` (it was found to be out of date), on disk and so for every process."""
        prefix, _ = split_key(key)
        for path in (
            self._layout.listing_file(record_name(store_id, prefix)),
            self._layout.attr_file(record_name(store_id, key)),
        ):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)

    async def _once(self, name: tuple[str, str, str], ask: Callable[[], Awaitable[None]]) -> None:
        """Run `ask`, or wait for the same question that is under way. A cancelled waiter does not stop it."""
        await asyncio.shield(self._start(name, ask))

    def _start(self, name: tuple[str, str, str], ask: Callable[[], Awaitable[None]]) -> asyncio.Task[None]:
        task = self._flights.get(name)
        if task is None:
            task = asyncio.ensure_future(ask())
            self._flights[name] = task
            task.add_done_callback(lambda done: self._land(name, done))
        return task

    def _land(self, name: tuple[str, str, str], task: asyncio.Task[None]) -> None:
        self._flights.pop(name, None)
        if not task.cancelled() and task.exception() is not None:
            # Whoever waits gets the error itself; a background listing has no one else to tell.
            log.info("%s %s of %s failed: %s", name[0], name[2] or "/", name[1], task.exception())

    async def close(self) -> None:
        """Stop questions under way."""
        tasks = list(self._flights.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _just_published(self, store: UnderStore, key: str) -> Known | None:
        # An age limit of a minute accepts what this call just wrote, whatever the mount's freshness.
        return self._reader.lookup(store.store_id, key, 60.0)

    async def _ask_for_key(self, store: UnderStore, key: str, *, refresh: bool) -> None:
        prefix, name = split_key(key)
        old = self._reader.any_listing(store.store_id, prefix)
        if not refresh and self._is_listing_cheaper(store.store_id, prefix, old):
            flight = self._start(("list", store.store_id, prefix), lambda: self._ask_for_prefix(store, prefix))
            if old is not None and old.requests <= _AWAITED_LIST_REQUESTS_MAX:
                await asyncio.shield(flight)
                return
        entry = await self._entry_of(store, key, name)
        if old is not None and old.find(name) != entry:
            # The listing is known to be wrong now; a reader must not find the old row in it.
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self._layout.listing_file(record_name(store.store_id, prefix)))
        builder = RecordBuilder()
        if entry is not None:
            builder.add(entry)
        self._publish(self._layout.attr_file(record_name(store.store_id, key)), builder, requests=1)

    def _is_listing_cheaper(self, store_id: str, prefix: str, old: Record | None) -> bool:
        counted = self._heads_since_old.pop((store_id, prefix), 0) + 1
        if counted > (_HEADS_BEFORE_LISTING if old is None else old.requests):
            return True
        self._heads_since_old[(store_id, prefix)] = counted
        if len(self._heads_since_old) > _COUNTED_PREFIXES_MAX:
            self._heads_since_old.popitem(last=False)
        return False

    async def _entry_of(self, store: UnderStore, key: str, name: bytes) -> RecordEntry | None:
        """What `key` is now: a directory if keys lie below it (also when it is an object too), a file, or nothing."""
        self.statistics.heads_sent += 1
        try:
            info = await store.head(key)
        except NotFoundError:
            pages = store.list_directory(key + "/")
            self.statistics.list_pages += 1
            async for page in pages:
                if page.objects or page.prefixes:
                    return RecordEntry(name, EntryKind.DIRECTORY, 0, 0, "")
                break
            return None
        return RecordEntry(name, EntryKind.FILE, info.size_bytes, info.mtime_ns, info.version)

    async def _ask_for_prefix(self, store: UnderStore, prefix: str) -> None:
        builder = RecordBuilder()
        asked_ns = self._clock.now_ns()
        pages = 0
        self.statistics.list_runs += 1
        async for page in store.list_directory(prefix):
            pages += 1
            self.statistics.list_pages += 1
            for info in page.objects:
                name = info.key[len(prefix) :].encode("utf-8", "surrogateescape")
                if self._is_shown_name(name):
                    builder.add_object(name, info)
                elif name:
                    builder.hidden_count += 1
            for child in page.prefixes:
                name = child[len(prefix) : -1].encode("utf-8", "surrogateescape")
                if self._is_shown_name(name):
                    builder.add(RecordEntry(name, EntryKind.DIRECTORY, 0, 0, ""))
                else:
                    builder.hidden_count += 1
        self._heads_since_old.pop((store.store_id, prefix), None)
        path = self._layout.listing_file(record_name(store.store_id, prefix))
        self._publish(path, builder, requests=max(1, pages), fetched_ns=asked_ns)

    def _publish(self, path: str, builder: RecordBuilder, *, requests: int, fetched_ns: int | None = None) -> None:
        """Write the record. Its age counts from before the question: the answer is at least that recent."""
        raw = builder.pack(
            boot_id=self._boot_id,
            fetched_ns=self._clock.now_ns() if fetched_ns is None else fetched_ns,
            wall_s=self._clock.wall_s(),
            requests=requests,
        )
        publish_record(path, raw, temporary=f"{self._temporary}/record-{os.getpid()}-{next(self._serial)}")
