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
import errno
import functools
import itertools
import logging
import math
import os
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Protocol

from orchestra.clock import Clock
from orchestra.errors import CacheDirectoryError, NotFoundError
from orchestra.metadata.differences import differ, differing_names
from orchestra.metadata.flights import Flights
from orchestra.metadata.reader import MetadataReader, record_name, split_key
from orchestra.metadata.records import Record, RecordBuilder, RecordEntry, publish_record, restamped
from orchestra.observe.change_log import Change, Scope
from orchestra.stores.contract import UnderStore
from orchestra.stores.pages import close_pages
from orchestra.values import EntryKind

log = logging.getLogger(__name__)

# HEADs in one directory after which it is listed in the background although nobody asked for its listing: a program
# that opens nine files of a folder by name will open more, and one LIST brings a thousand.
_HEADS_BEFORE_LISTING = 8
# A listing that took more requests than this runs beside the HEADs instead of being waited for.
_AWAITED_LIST_REQUESTS_MAX = 4
# The share of its freshness that a listing has left when it comes, however long it took: listing again and again takes
# the store's time then, and a folder's names are still used at least half as long as its mount allows.
_LEFT_OF_SLOW_LISTINGS = 0.5
# Sorting and writing takes 3 us a row: a larger listing is written by a thread, and others are answered meanwhile.
_INLINE_ROWS_MAX = 2000
_ROW_BYTES = 90  # name, version, size, time
_INLINE_BYTES_MAX = _INLINE_ROWS_MAX * _ROW_BYTES
# Prefixes whose HEADs since their listing grew old are counted, and those with hidden keys; forgetting one costs a few
# HEADs, or makes a number in the status too small.
_COUNTED_PREFIXES_MAX = 4096
# Answers to HEADs that the next listing of their prefix is compared with.
_HEADS_SEEN_MAX = 1000
# Listings that were found to be wrong and taken away, kept to see what the next one says otherwise; mapped files.
_OUTDATED_MAX = 256


class Layout(Protocol):
    """Where records lie; the cache directory's layout."""

    def listing_file(self, name: str) -> str: ...

    def attr_file(self, name: str) -> str: ...


class Elsewhere(Protocol):
    """Other nodes of a cluster, each of which lists some prefixes for all."""

    def lists(self, store_id: str, prefix: str) -> bool:
        """Whether another node is to list `prefix`."""
        ...

    async def listing(
        self, store_id: str, prefix: str, freshness_s: float, *, refresh: bool
    ) -> tuple[bytes, int] | None:
        """Return a record no older than asked, and when it was fetched by this node's clock; None where the other node
        cannot give it: then this one lists. `refresh`: fetched after this call."""
        ...


@dataclass(slots=True)
class MetadataStatistics:
    """Counts since the start."""

    stats_total: int = 0
    lists_total: int = 0
    heads_sent: int = 0
    list_runs: int = 0
    list_pages: int = 0
    lists_from_others: int = 0


@dataclass(slots=True)
class _Heads:
    """HEADs sent below a prefix since its listing grew old: how many, and what the last ones said."""

    count: int = 0
    seen: dict[bytes, RecordEntry | None] = field(default_factory=dict)


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
        make_room: Callable[[], object] = lambda: None,
        on_change: Callable[[list[Change]], object] = lambda changes: None,
    ) -> None:
        """`make_room` is called when the disk has no room for a record, before it is tried once more; `on_change` when
        something was found to be otherwise than it had been published, after that has been replaced or taken away."""
        self._layout = layout
        self._temporary = temporary
        self._reader = reader
        self._clock = clock
        self._boot_id = boot_id
        self._is_shown_name = is_shown_name
        self._make_room = make_room
        self._on_change = on_change
        self._outdated: OrderedDict[tuple[str, str], Record] = OrderedDict()
        self._stats: Flights[RecordEntry | None] = Flights("look-up", clock)
        self._lists: Flights[Record] = Flights("listing", clock)
        # Apart: who asks for another node must never wait for a question of ours to that node.
        self._asked_elsewhere: Flights[Record] = Flights("listing by another node", clock)
        self.elsewhere: Elsewhere | None = None  # set where there is a cluster
        self._heads_since_old: OrderedDict[tuple[str, str], _Heads] = OrderedDict()
        self._hidden: OrderedDict[tuple[str, str], tuple[int, str]] = OrderedDict()
        self._serial = itertools.count()
        self.statistics = MetadataStatistics()

    async def stat(
        self, store: UnderStore, key: str, freshness_s: float, *, refresh: bool = False
    ) -> RecordEntry | None:
        """Return the entry for `key`, no older than asked, or None if nothing is there; its record is published.

        `refresh` asks the store whatever is known, and does not join a question that was asked before. A freshness of
        zero (`strict`) is the same, and publishes nothing, since nobody could use it.
        """
        self.statistics.stats_total += 1
        is_now = refresh or freshness_s <= 0
        if not is_now:
            known = self._reader.lookup(store.store_id, key, freshness_s)
            if known is not None:
                return known.entry
        return await self._stats.ask(
            (store.store_id, key),
            lambda: self._ask_for_key(store, key, freshness_s, is_now=is_now),
            age_max_s=0.0 if is_now else freshness_s,
        )

    async def list_directory(
        self, store: UnderStore, prefix: str, freshness_s: float, *, refresh: bool = False, is_for_peer: bool = False
    ) -> Record:
        """Return the listing of `prefix`, no older than asked; it is published. An empty one says nothing is there.

        `is_for_peer`: another node asks, so this one does not ask others.
        """
        self.statistics.lists_total += 1
        is_now = refresh or freshness_s <= 0
        if not is_now:
            record = self._reader.listing(store.store_id, prefix, freshness_s)
            if record is not None:
                return record
        return await self._listing(store, prefix, freshness_s, is_now=is_now, is_for_peer=is_for_peer)

    def _listing(
        self, store: UnderStore, prefix: str, freshness_s: float, *, is_now: bool = False, is_for_peer: bool = False
    ) -> Awaitable[Record]:
        """Ask for a listing, or join the same question: the node that lists it for all, or the store."""
        name, age_max_s = (store.store_id, prefix), 0.0 if is_now else freshness_s
        other = self.elsewhere
        # A listing that nobody may use twice is asked of the store itself: to go by another node would spare nothing.
        if other is None or is_for_peer or freshness_s <= 0 or not other.lists(*name):
            return self._lists.ask(name, lambda: self._ask_for_prefix(store, prefix, freshness_s), age_max_s=age_max_s)
        return self._asked_elsewhere.ask(
            name, lambda: self._ask_elsewhere(other, store, prefix, freshness_s, is_now), age_max_s=age_max_s
        )

    def forget(self, store_id: str, key: str) -> None:
        """Drop what is known about `key` (it was found to be out of date), on disk and so for every process."""
        prefix, _ = split_key(key)
        changes = self._drop_listing(store_id, prefix)
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self._layout.attr_file(record_name(store_id, key)))
        self._on_change([Change(Scope.KEY, store_id, key), *changes])

    def _drop_listing(self, store_id: str, prefix: str) -> list[Change]:
        """Take a listing away that was found to be wrong in one place; return what may be wrong with it."""
        old = self._reader.any_listing(store_id, prefix)
        if old is None:
            return []
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self._layout.listing_file(record_name(store_id, prefix)))
        self._outdated[(store_id, prefix)] = old
        if len(self._outdated) > _OUTDATED_MAX:
            self._outdated.popitem(last=False)
        return [Change(Scope.CHILDREN, store_id, prefix)]

    async def close(self) -> None:
        """Stop questions under way."""
        await self._stats.close()
        await self._asked_elsewhere.close()
        await self._lists.close()

    async def _ask_for_key(
        self, store: UnderStore, key: str, freshness_s: float, *, is_now: bool
    ) -> RecordEntry | None:
        prefix, name = split_key(key)
        old = self._reader.any_listing(store.store_id, prefix)
        if not is_now and self._is_listing_cheaper(store.store_id, prefix, old):
            if old is not None and old.requests <= _AWAITED_LIST_REQUESTS_MAX:
                return (await self._listing(store, prefix, freshness_s)).find(name)
            self._start_listing(store, prefix, freshness_s)
        asked_ns = self._clock.now_ns()
        entry = await self._entry_of(store, key, name)
        heads = self._heads_since_old.get((store.store_id, prefix))
        if heads is not None and len(heads.seen) < _HEADS_SEEN_MAX:
            heads.seen[name] = entry
        changes = []
        known = self._reader.any_attr(store.store_id, key)
        if known is not None and differ(known.row(0) if known.count else None, entry):
            changes = [Change(Scope.KEY, store.store_id, key)]
        if old is not None and differ(old.find(name), entry):
            # The listing is known to be wrong now; a reader must not find the old row in it.
            changes = [Change(Scope.KEY, store.store_id, key), *self._drop_listing(store.store_id, prefix)]
        if freshness_s > 0:
            builder = RecordBuilder()
            if entry is not None:
                builder.add(entry)
            try:
                path = self._layout.attr_file(record_name(store.store_id, key))
                self._publish(path, builder, requests=1, fetched_ns=self._counts_from(asked_ns, freshness_s))
            except OSError as error:
                # Whoever asked has the answer all the same; the next one asks again.
                log.warning("what is known of %r cannot be published: %s", key, error)
        self._on_change(changes)
        return entry

    def _is_listing_cheaper(self, store_id: str, prefix: str, old: Record | None) -> bool:
        heads = self._heads_since_old.setdefault((store_id, prefix), _Heads())
        self._heads_since_old.move_to_end((store_id, prefix))
        heads.count += 1
        if heads.count > (_HEADS_BEFORE_LISTING if old is None else old.requests):
            heads.count = 0
            return True
        if len(self._heads_since_old) > _COUNTED_PREFIXES_MAX:
            self._heads_since_old.popitem(last=False)
        return False

    async def _entry_of(self, store: UnderStore, key: str, name: bytes) -> RecordEntry | None:
        """What `key` is now: a file if there is such an object, a directory if keys lie below it, or nothing.

        Where both are true a listing says directory. Here it is a file: to know better would take a LIST for each HEAD.
        """
        self.statistics.heads_sent += 1
        try:
            info = await store.head(key)
        except NotFoundError:
            return RecordEntry(name, EntryKind.DIRECTORY, 0, 0, "") if await self._holds_keys(store, key) else None
        return RecordEntry(name, EntryKind.FILE, info.size_bytes, info.mtime_ns, info.version)

    async def _holds_keys(self, store: UnderStore, key: str) -> bool:
        pages = store.list_directory(key + "/")
        try:
            async for page in pages:  # a store may send an empty page before one that is not
                self.statistics.list_pages += 1
                if page.objects or page.prefixes:
                    return True
            return False
        finally:
            await close_pages(pages)

    def _start_listing(self, store: UnderStore, prefix: str, freshness_s: float) -> None:
        """Have it listed; nobody waits."""
        name, other = (store.store_id, prefix), self.elsewhere
        if other is not None and other.lists(*name):
            self._asked_elsewhere.start(
                name, lambda: self._ask_elsewhere(other, store, prefix, freshness_s, is_now=False)
            )
        else:
            self._lists.start(name, lambda: self._ask_for_prefix(store, prefix, freshness_s))

    async def _ask_elsewhere(
        self, other: Elsewhere, store: UnderStore, prefix: str, freshness_s: float, is_now: bool
    ) -> Record:
        """Have the node list `prefix` that does it for all; where it cannot, list it here."""
        # What was found to be wrong came from there, and is there still.
        refresh = is_now or (store.store_id, prefix) in self._outdated
        answer = await other.listing(store.store_id, prefix, freshness_s, refresh=refresh)
        if answer is None:
            return await self._listing(store, prefix, freshness_s, is_now=is_now, is_for_peer=True)
        old = self._reader.any_listing(store.store_id, prefix)
        raw = restamped(answer[0], boot_id=self._boot_id, fetched_ns=answer[1])
        self.statistics.lists_from_others += 1
        return await self._keep(store.store_id, prefix, old, lambda path: self._write(path, raw), len(raw))

    async def _ask_for_prefix(self, store: UnderStore, prefix: str, freshness_s: float) -> Record:
        builder = RecordBuilder()
        asked_ns = self._clock.now_ns()
        pages = 0
        old = self._reader.any_listing(store.store_id, prefix)
        self.statistics.list_runs += 1
        async for page in store.list_directory(prefix):
            pages += 1
            self.statistics.list_pages += 1
            for info in page.objects:
                name = info.key[len(prefix) :].encode("utf-8", "surrogateescape")
                if self._is_shown_name(name):
                    builder.add_object(name, info)
                elif name:
                    builder.hide(name)
            for child in page.prefixes:
                name = child[len(prefix) : -1].encode("utf-8", "surrogateescape")
                if self._is_shown_name(name):
                    builder.add(RecordEntry(name, EntryKind.DIRECTORY, 0, 0, ""))
                else:
                    builder.hide(name + b"/")
        requests, fetched_ns = max(1, pages), self._counts_from(asked_ns, freshness_s)

        def publish(path: str) -> bytes:
            return self._publish(path, builder, requests=requests, fetched_ns=fetched_ns)

        return await self._keep(store.store_id, prefix, old, publish, len(builder) * _ROW_BYTES)

    async def _keep(
        self, store_id: str, prefix: str, old: Record | None, publish: Callable[[str], bytes], size_bytes: int
    ) -> Record:
        """Publish a new listing and tell what it says otherwise than before. Raises CacheDirectoryError."""
        path = self._layout.listing_file(record_name(store_id, prefix))
        try:
            raw = await asyncio.to_thread(publish, path) if size_bytes > _INLINE_BYTES_MAX else publish(path)
        except OSError as error:
            raise CacheDirectoryError(
                f"the listing of {prefix or '/'} of {store_id} cannot be kept in the cache directory: "
                f"{error.strerror}; free some space there"
            ) from error
        record = Record(memoryview(raw), (0, 0))
        self._note_hidden(store_id, prefix, record)
        await self._note_changes(store_id, prefix, old, record)
        return record

    async def _note_changes(self, store_id: str, prefix: str, old: Record | None, new: Record) -> None:
        """Tell what a new listing says otherwise than the one before, or than single look-ups before it."""
        heads = self._heads_since_old.pop((store_id, prefix), _Heads())
        outdated = self._outdated.pop((store_id, prefix), None)
        before = old or outdated
        names: list[bytes] | None = []
        if before is not None:
            compare = functools.partial(differing_names, before, new)
            names = await asyncio.to_thread(compare) if len(new) > _INLINE_ROWS_MAX else compare()
        if names is None:
            self._on_change([Change(Scope.CHILDREN, store_id, prefix)])
            return
        asked = {name for name, entry in heads.seen.items() if differ(entry, new.find(name))}
        keys = (prefix + name.decode("utf-8", "surrogateescape") for name in asked.union(names))
        self._on_change([Change(Scope.KEY, store_id, key) for key in keys])

    def hidden(self, store_id: str) -> tuple[int, str]:
        """Return how many keys of the store no folder can show, in what was listed since the start, and one of them."""
        found = [hidden for (store, _), hidden in self._hidden.items() if store == store_id]
        return sum(count for count, _ in found), found[0][1] if found else ""

    def _note_hidden(self, store_id: str, prefix: str, record: Record) -> None:
        self._hidden.pop((store_id, prefix), None)
        if record.hidden_count:
            example = prefix + record.hidden_example.decode("utf-8", "surrogateescape")
            self._hidden[(store_id, prefix)] = (record.hidden_count, example)
            if len(self._hidden) > _COUNTED_PREFIXES_MAX:
                self._hidden.popitem(last=False)

    def _counts_from(self, asked_ns: int, freshness_s: float) -> int:
        """Return when an answer's age begins: when it was asked for, but half of `freshness_s` is always left of it.

        A million names take longer to list than the usual freshness of a minute: such a listing would be too old for
        everybody when it comes, and each name in it would cost a HEAD.
        """
        if not 0 < freshness_s < math.inf:
            return asked_ns
        return max(asked_ns, self._clock.now_ns() - int(freshness_s * (1 - _LEFT_OF_SLOW_LISTINGS) * 1e9))

    def _publish(self, path: str, builder: RecordBuilder, *, requests: int, fetched_ns: int) -> bytes:
        """Write the record and return its bytes. Its age counts from `fetched_ns`. Raises OSError."""
        raw = builder.pack(
            boot_id=self._boot_id,
            fetched_ns=fetched_ns,
            wall_s=self._clock.wall_s(),
            requests=requests,
        )
        return self._write(path, raw)

    def _write(self, path: str, raw: bytes) -> bytes:
        """Publish what is packed. Raises OSError."""
        temporary = f"{self._temporary}/record-{os.getpid()}-{next(self._serial)}"
        try:
            publish_record(path, raw, temporary=temporary)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            self._make_room()
            publish_record(path, raw, temporary=temporary)
        return raw
