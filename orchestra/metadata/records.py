"""The published record of a directory or of one key: a small columnar file, mapped by readers. Golden-tested.

One format serves both: a listing holds all entries of a prefix, an attr record holds one entry, or none for a key that
is known to be absent. Columns (names sorted by their bytes, sizes, times, kinds, versions) are read in place: finding a
name among 100,000 is seventeen comparisons and no parsing. Why not Arrow: importing pyarrow costs every reader 0.2 s
and 40 MB (docs/decisions/0001-listing-files.md).

A record says when it was fetched on the clock of one boot (`fetched_ns`, `boot_id`); from another boot its age is
unknown.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import secrets
import struct
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import crc32c

from orchestra.values import EntryKind, ObjectInfo

_HEADER = struct.Struct("<4sI16sQdQIIQQI4x")
# magic, format, boot id, fetched ns, fetched wall s, count, requests, hidden, names bytes, versions bytes, crc
_MAGIC = b"ORCL"
FORMAT_VERSION = 1
# A time in nanoseconds that every file system can hold: up to the year 2006.
_IDENTITY_BITS = 60
# Indexing is four times as quick as calling the enum, and rows are read by the hundred thousand.
_KINDS = (EntryKind.FILE, EntryKind.FILE, EntryKind.DIRECTORY)
_FILE, _DIRECTORY = int(EntryKind.FILE), int(EntryKind.DIRECTORY)
assert all(_KINDS[kind] is kind for kind in EntryKind)


@dataclass(frozen=True, slots=True)
class RecordEntry:
    """One row: a name below the prefix and what it is. Directories have size 0, version ""."""

    name: bytes
    kind: EntryKind
    size_bytes: int
    mtime_ns: int
    version: str


class RecordBuilder:
    """Collects rows page by page in columns, so that a million entries cost their bytes and no objects."""

    def __init__(self) -> None:
        self._names = bytearray()
        self._name_stops = array("Q")
        self._versions = bytearray()
        self._version_stops = array("Q")
        self._sizes = array("q")
        self._mtimes = array("q")
        self._kinds = bytearray()
        self.hidden_count = 0
        self.hidden_example = b""

    def __len__(self) -> int:
        return len(self._sizes)

    def hide(self, name: bytes) -> None:
        """Count what no folder can show; the first `name` (below the prefix, "/" after a directory's) is told."""
        self.hidden_count += 1
        self.hidden_example = self.hidden_example or name

    def add(self, entry: RecordEntry) -> None:
        """Append a row, in any order."""
        self._names += entry.name
        self._name_stops.append(len(self._names))
        self._versions += entry.version.encode("utf-8", "surrogateescape")
        self._version_stops.append(len(self._versions))
        self._sizes.append(entry.size_bytes)
        self._mtimes.append(entry.mtime_ns)
        self._kinds.append(entry.kind)

    def add_object(self, name: bytes, info: ObjectInfo) -> None:
        """Append a file's row; `add` without a value between."""
        self._names += name
        self._name_stops.append(len(self._names))
        self._versions += info.version.encode("utf-8", "surrogateescape")
        self._version_stops.append(len(self._versions))
        self._sizes.append(info.size_bytes)
        self._mtimes.append(info.mtime_ns)
        self._kinds.append(_FILE)

    def pack(self, *, boot_id: bytes, fetched_ns: int, wall_s: float, requests: int) -> bytes:
        """Return the file's bytes: rows sorted by name; a name that is both file and directory is a directory."""
        order = self._order()
        names, name_offsets = self._gather(order, self._names, self._name_stops)
        versions, version_offsets = self._gather(order, self._versions, self._version_stops)
        sizes = array("q", (self._sizes[i] for i in order))
        mtimes = array("q", (self._mtimes[i] for i in order))
        kinds = bytes(self._kinds[i] for i in order)
        columns = (name_offsets, version_offsets, sizes, mtimes, kinds, names, versions, self.hidden_example)
        header = _HEADER.pack(
            _MAGIC,
            FORMAT_VERSION,
            boot_id,
            fetched_ns,
            wall_s,
            len(order),
            requests,
            self.hidden_count,
            len(names),
            len(versions),
            0,
        )
        crc = crc32c.crc32c(header)
        for column in columns:
            crc = crc32c.crc32c(column, crc)
        return b"".join((header[:-8], struct.pack("<I4x", crc), *columns))

    def _name(self, index: int) -> bytes:
        return bytes(self._names[self._name_stops[index - 1] if index else 0 : self._name_stops[index]])

    def _order(self) -> list[int]:
        """Row numbers in order of name, without files that a directory of the same name hides."""
        names = [self._name(i) for i in range(len(self))]
        order = sorted(range(len(self)), key=names.__getitem__)
        kept: list[int] = []
        for i in order:
            if kept and names[i] == names[kept[-1]]:
                self.hide(names[i])
                if self._kinds[i] > self._kinds[kept[-1]]:  # directories are 2, files 1
                    kept[-1] = i
            else:
                kept.append(i)
        return kept

    @staticmethod
    def _gather(order: list[int], blob: bytearray, stops: array[int]) -> tuple[bytearray, array[int]]:
        """Bytes in that order and where each ends; as one block, since a million small objects are 50 MB."""
        offsets = array("Q", [0])
        gathered = bytearray()
        for i in order:
            gathered += blob[stops[i - 1] if i else 0 : stops[i]]
            offsets.append(len(gathered))
        return gathered, offsets


class Record:
    """A record, mapped or in memory; immutable. Rows by number or by name."""

    __slots__ = (
        "_kinds",
        "_mtimes",
        "_name_offsets",
        "_names",
        "_raw",
        "_sizes",
        "_version_offsets",
        "_versions",
        "boot_id",
        "count",
        "fetched_ns",
        "hidden_count",
        "hidden_example",
        "identity",
        "requests",
    )

    def __init__(self, raw: memoryview, identity: tuple[int, int]) -> None:
        """Raises ValueError for anything that is not an intact record."""
        if len(raw) < _HEADER.size:
            raise ValueError("too short")
        magic, version, boot, fetched, _, count, requests, hidden, names, versions, crc = _HEADER.unpack_from(raw)
        if magic != _MAGIC or version != FORMAT_VERSION:
            raise ValueError("another format")
        head = bytes(raw[: _HEADER.size - 8]) + bytes(8)
        if crc32c.crc32c(raw[_HEADER.size :], crc32c.crc32c(head)) != crc:
            raise ValueError("damaged")
        self._raw = raw
        self.boot_id: bytes = boot
        self.fetched_ns: int = fetched
        self.count: int = count
        self.requests: int = requests
        self.hidden_count = hidden
        self.identity = identity
        at = _HEADER.size
        self._name_offsets = raw[at : (at := at + 8 * (count + 1))].cast("Q")
        self._version_offsets = raw[at : (at := at + 8 * (count + 1))].cast("Q")
        self._sizes = raw[at : (at := at + 8 * count)].cast("q")
        self._mtimes = raw[at : (at := at + 8 * count)].cast("q")
        self._kinds = raw[at : (at := at + count)]
        self._names = raw[at : (at := at + names)]
        self._versions = raw[at : (at := at + versions)]
        self.hidden_example = bytes(raw[at:])  # one name that is hidden; nothing if none is

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[RecordEntry]:
        for index in range(self.count):
            yield self.row(index)

    def directories(self) -> Iterator[bytes]:
        """The names of the directories, in order; files between them cost nothing."""
        kinds = bytes(self._kinds)
        at = kinds.find(_DIRECTORY)
        while at >= 0:
            yield self.name(at)
            at = kinds.find(_DIRECTORY, at + 1)

    @property
    def raw(self) -> memoryview:
        """The whole record as it is on disk."""
        return self._raw

    def name(self, index: int) -> bytes:
        """The name in row `index`."""
        return bytes(self._names[self._name_offsets[index] : self._name_offsets[index + 1]])

    def row(self, index: int) -> RecordEntry:
        """Row `index`."""
        version = bytes(self._versions[self._version_offsets[index] : self._version_offsets[index + 1]])
        return RecordEntry(
            self.name(index),
            _KINDS[self._kinds[index]],
            self._sizes[index],
            self._mtimes[index],
            version.decode("utf-8", "surrogateescape"),
        )

    def names(self, start: int, stop: int) -> list[tuple[bytes, bool, bytes]]:
        """(name, is a directory, version) of a run of rows: what a listing needs, some 0.5 us a row."""
        name_stops = self._name_offsets[start : stop + 1].tolist()
        version_stops = self._version_offsets[start : stop + 1].tolist()
        names = bytes(self._names[name_stops[0] : name_stops[-1]])
        versions = bytes(self._versions[version_stops[0] : version_stops[-1]])
        first_name, first_version = name_stops[0], version_stops[0]
        kinds = self._kinds[start:stop]
        return [
            (
                names[name_stops[at] - first_name : name_stops[at + 1] - first_name],
                kinds[at] != _FILE,
                versions[version_stops[at] - first_version : version_stops[at + 1] - first_version],
            )
            for at in range(len(kinds))
        ]

    def find(self, name: bytes) -> RecordEntry | None:
        """The row with that name, in O(log n)."""
        index = self.index_of(name)
        return self.row(index) if index is not None else None

    def index_of(self, name: bytes) -> int | None:
        """The number of the row with that name, in O(log n)."""
        low, high = 0, self.count
        offsets, names = self._name_offsets, self._names
        while low < high:
            middle = (low + high) // 2
            if bytes(names[offsets[middle] : offsets[middle + 1]]) < name:
                low = middle + 1
            else:
                high = middle
        return low if low < self.count and self.name(low) == name else None

    def same_rows(self, other: Record) -> bool:
        """Whether both hold the same names, kinds, sizes and versions; times may differ."""
        return self.count == other.count and all(
            ours == theirs
            for ours, theirs in (
                (self._kinds, other._kinds),
                (self._sizes.cast("B"), other._sizes.cast("B")),
                (self._name_offsets.cast("B"), other._name_offsets.cast("B")),
                (self._version_offsets.cast("B"), other._version_offsets.cast("B")),
                (self._names, other._names),
                (self._versions, other._versions),
            )
        )

    def age_ns(self, *, boot_id: bytes, now_ns: int) -> int | None:
        """Nanoseconds since it was fetched; None if that was in another boot."""
        return now_ns - self.fetched_ns if self.boot_id == boot_id else None

    def is_fresh(self, freshness_s: float, *, boot_id: bytes, now_ns: int) -> bool:
        """Whether it may be used without asking, under that freshness (inf: always)."""
        if freshness_s == float("inf"):
            return True
        age = self.age_ns(boot_id=boot_id, now_ns=now_ns)
        return age is not None and age <= freshness_s * 1e9 and freshness_s > 0


def restamped(raw: bytes | memoryview, *, boot_id: bytes, fetched_ns: int) -> bytes:
    """Return the record `raw`, which another node packed, as fetched at `fetched_ns` of this boot. Raises ValueError if
    it is none."""
    Record(memoryview(raw), (0, 0))
    magic, version, _, _, *rest = _HEADER.unpack_from(raw)
    header = _HEADER.pack(magic, version, boot_id, max(0, fetched_ns), *rest[:-1], 0)
    body = raw[_HEADER.size :]
    crc = crc32c.crc32c(body, crc32c.crc32c(header))
    return b"".join((header[:-8], struct.pack("<I4x", crc), body))


def open_record(path: str) -> Record | None:
    """Map the record at `path`; None if there is none or it is damaged (the daemon writes it anew on demand)."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:
        return None
    try:
        info = os.fstat(fd)
        # A mapping costs a page table entry and a VMA; what fits a few pages is read.
        raw = (
            os.read(fd, info.st_size) if info.st_size <= 16384 else mmap.mmap(fd, info.st_size, access=mmap.ACCESS_READ)
        )
        return Record(memoryview(raw), (info.st_ino, info.st_mtime_ns))
    except (OSError, ValueError):
        return None
    finally:
        os.close(fd)


def publish_record(path: str, raw: bytes, *, temporary: str) -> None:
    """Put the record in place: written under another name, then renamed. Not synced: it can be fetched again.

    Raises OSError; nothing is left behind then.
    """
    try:
        Path(temporary).write_bytes(raw)
        # Readers tell one record from the next by inode and time. The kernel gives a freed inode to the next file, and
        # stamps files by a clock that ticks every few milliseconds: a number of our own cannot come twice.
        number_ns = secrets.randbits(_IDENTITY_BITS)
        os.utime(temporary, ns=(number_ns, number_ns))
        os.rename(temporary, path)
    except OSError:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise
