"""The words that every layer shares: byte ranges, object names and versions, directory entries.

Owns: immutable values and their arithmetic. Leaves to others: where they come from.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass

import xxhash

from orchestra.errors import UsageError


@dataclass(frozen=True, slots=True, order=True)
class ByteRange:
    """A half-open run of bytes, `start <= stop`; the empty range is allowed."""

    start: int
    stop: int

    def __post_init__(self) -> None:
        if not 0 <= self.start <= self.stop:
            raise UsageError(f"not a byte range: [{self.start}, {self.stop})")

    @property
    def length(self) -> int:
        """Bytes in the range."""
        return self.stop - self.start


class EntryKind(enum.IntEnum):
    """What a name in the namespace is. The numbers are on disk: never reuse one."""

    FILE = 1
    DIRECTORY = 2


@dataclass(frozen=True, slots=True)
class ObjectInfo:
    """What a store says about one object. `key` is relative to the mount's root, without a leading slash.

    `version` changes whenever the bytes do: the ETag as the store sent it (quotes included), or "size-mtime" where a
    store has none (`weak_version`).
    """

    key: str
    size_bytes: int
    mtime_ns: int
    version: str


def weak_version(size_bytes: int, mtime_ns: int) -> str:
    """Return the version of an object whose store has no ETag: its size and modification time."""
    return f"{size_bytes:x}-{mtime_ns:x}"


@dataclass(frozen=True, slots=True)
class ObjectId:
    """Names one version of one object of one store; the bytes it names never change."""

    store_id: str
    key: str
    version: str

    def digest(self) -> str:
        """Return 32 hex digits that stand for this id in the cache directory.

        xxh3_128 over store id, key and version with NUL between (none of them may hold one). Golden-tested: the
        cache of an older orchestra would otherwise be unreadable.
        """
        text = f"{self.store_id}\0{self.key}\0{self.version}"
        return xxhash.xxh3_128_hexdigest(text.encode("utf-8", "surrogateescape"))


@dataclass(frozen=True, slots=True)
class Entry:
    """One name in the namespace, as `ls` and `stat` show it.

    `path` is absolute; a directory has size 0 and version "".
    """

    path: str
    kind: EntryKind
    size_bytes: int
    mtime_ns: int
    version: str

    @property
    def name(self) -> str:
        """The last component; "" for the root."""
        return self.path.rsplit("/", 1)[-1]

    @property
    def is_directory(self) -> bool:
        """Whether the entry is a directory."""
        return self.kind is EntryKind.DIRECTORY
