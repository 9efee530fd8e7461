"""What is known on this node about keys and prefixes, from published records alone; for any process.

Owns: which record answers a question and whether it is fresh. Leaves to others: asking for what is not known.
"""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

import xxhash

from orchestra.clock import Clock
from orchestra.metadata.records import Record, RecordEntry, open_record

# Records kept mapped per process: directories in use at one time; a mapping costs little, an open about 30 us.
_RECORDS_MAX = 1024


@dataclass(frozen=True, slots=True)
class Known:
    """An answer: the entry, or None when it is known that nothing is there."""

    entry: RecordEntry | None


def record_name(store_id: str, key: str) -> str:
    """Return the file name of the record of `key` (or of the prefix `key`, which ends with "/" or is "")."""
    return xxhash.xxh3_128_hexdigest(f"{store_id}\0{key}".encode("utf-8", "surrogateescape"))


def split_key(key: str) -> tuple[str, bytes]:
    """Split a key into the prefix that lists it and its name there: "a/b" -> ("a/", b"b")."""
    at = key.rfind("/") + 1
    return key[:at], key[at:].encode("utf-8", "surrogateescape")


class MetadataReader:
    """Reads published records. Thread-safe."""

    def __init__(
        self,
        listing_file: Callable[[str], str],
        attr_file: Callable[[str], str],
        *,
        clock: Clock,
        boot_id: bytes,
    ) -> None:
        self._listing_file = listing_file
        self._attr_file = attr_file
        self._clock = clock
        self._boot_id = boot_id
        self._records: OrderedDict[str, Record] = OrderedDict()
        self._lock = threading.Lock()

    def lookup(self, store_id: str, key: str, freshness_s: float) -> Known | None:
        """Return what is known and fresh about `key` ("" excluded), or None.

        The listing that holds the key answers if it is fresh, else the key's own record.
        """
        found = self._answer(store_id, key, freshness_s)
        return found[0] if found is not None else None

    def lookup_aged(self, store_id: str, key: str, freshness_s: float) -> tuple[Known, float | None] | None:
        """As `lookup`, with the age in seconds of what it answers from (None: of another boot)."""
        found = self._answer(store_id, key, freshness_s)
        return (found[0], self._age_s(found[1])) if found is not None else None

    def _answer(self, store_id: str, key: str, freshness_s: float) -> tuple[Known, Record] | None:
        prefix, name = split_key(key)
        listing = self._fresh(self._listing_file(record_name(store_id, prefix)), freshness_s)
        if listing is not None:
            return Known(listing.find(name)), listing
        attr = self._fresh(self._attr_file(record_name(store_id, key)), freshness_s)
        if attr is not None:
            return Known(attr.row(0) if attr.count else None), attr
        return None

    def age_s(self, store_id: str, key: str, freshness_s: float) -> float | None:
        """Return the age in seconds of what `lookup` answers from, None if nothing fresh is known.

        `key` may also be a prefix ("" or ending with "/"): then it is the age of its listing.
        """
        paths = [self._listing_file(record_name(store_id, key))]
        if key and not key.endswith("/"):
            paths = [
                self._listing_file(record_name(store_id, split_key(key)[0])),
                self._attr_file(record_name(store_id, key)),
            ]
        for path in paths:
            record = self._fresh(path, freshness_s)
            if record is not None:
                return self._age_s(record)
        return None

    def _age_s(self, record: Record) -> float | None:
        age = record.age_ns(boot_id=self._boot_id, now_ns=self._clock.now_ns())
        return age / 1e9 if age is not None else None

    def listing(self, store_id: str, prefix: str, freshness_s: float) -> Record | None:
        """Return the fresh listing of `prefix`, or None."""
        return self._fresh(self._listing_file(record_name(store_id, prefix)), freshness_s)

    def any_listing(self, store_id: str, prefix: str) -> Record | None:
        """Return the listing of `prefix` however old it is, or None."""
        return self._open(self._listing_file(record_name(store_id, prefix)))

    def any_attr(self, store_id: str, key: str) -> Record | None:
        """Return the record of one key however old it is, or None."""
        return self._open(self._attr_file(record_name(store_id, key)))

    def _fresh(self, path: str, freshness_s: float) -> Record | None:
        record = self._open(path)
        if record is None or not record.is_fresh(freshness_s, boot_id=self._boot_id, now_ns=self._clock.now_ns()):
            return None
        return record

    def _open(self, path: str) -> Record | None:
        """The record at `path` now: the one in memory if the file is still the same."""
        record = self._records.get(path)
        try:
            info = os.stat(path, follow_symlinks=False)
        except OSError:
            return None
        # The time as well as the inode: file systems give a freed inode number to the next file at once.
        if record is not None and record.identity == (info.st_ino, info.st_mtime_ns):
            return record
        record = open_record(path)
        if record is None:
            return None
        with self._lock:
            self._records[path] = record
            self._records.move_to_end(path)
            while len(self._records) > _RECORDS_MAX:
                self._records.popitem(last=False)
        return record
