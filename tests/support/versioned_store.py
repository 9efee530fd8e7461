"""An under store in memory that an outside writer may change at any moment, and that counts what it is asked.

Every put makes a new version; a read names the version it wants, as a conditional GET does. A page holds 1,000 names.
Any thread may put and delete; the rest belongs to the node's loop.
"""

from __future__ import annotations

import bisect
import itertools
from collections.abc import AsyncIterator
from dataclasses import dataclass

from orchestra.errors import NotFoundError, StaleObjectError
from orchestra.stores.contract import ListPage
from orchestra.values import ByteRange, ObjectInfo

PAGE_KEYS = 1000


@dataclass(frozen=True, slots=True)
class Stored:
    """One version of one object."""

    info: ObjectInfo
    data: bytes


class VersionedStore:
    """See UnderStore. `reads` holds every GET as (key, start, stop)."""

    def __init__(self, name: str = "versioned://test/") -> None:
        self.store_id = name
        self.objects: dict[str, Stored] = {}
        self.heads: list[str] = []
        self.lists: list[str] = []
        self.reads: list[tuple[str, int, int]] = []
        self._numbers = itertools.count(1)
        self._sorted: list[str] | None = None

    @property
    def requests(self) -> int:
        """All requests, of every kind."""
        return len(self.heads) + len(self.lists) + len(self.reads)

    # -- the outside writer ----------------------------------------------------------------------------------------

    def put(self, key: str, data: bytes) -> str:
        """Write an object; returns its version."""
        number = next(self._numbers)
        info = ObjectInfo(key, len(data), number * 1_000_000_000, f'"v{number}"')
        self.objects[key] = Stored(info, data)
        self._sorted = None
        return info.version

    def delete(self, key: str) -> None:
        """Delete an object, if it is there."""
        self.objects.pop(key, None)
        self._sorted = None

    # -- the store -------------------------------------------------------------------------------------------------

    async def head(self, key: str) -> ObjectInfo:
        self.heads.append(key)
        stored = self.objects.get(key)
        if stored is None:
            raise NotFoundError(f"{self.store_id}: no object {key!r}")
        return stored.info

    async def list_directory(self, prefix: str) -> AsyncIterator[ListPage]:
        names = self._names_below(prefix)
        for start in range(0, max(1, len(names)), PAGE_KEYS):
            self.lists.append(prefix)
            page = names[start : start + PAGE_KEYS]
            objects = (self.objects.get(name) for name in page if name == prefix or not name.endswith("/"))
            prefixes = (name for name in page if name != prefix and name.endswith("/"))
            yield ListPage(tuple(stored.info for stored in objects if stored is not None), tuple(prefixes))

    def _names_below(self, prefix: str) -> list[str]:
        """The keys directly below `prefix` and the prefixes there, which end with a slash; in order."""
        if self._sorted is None:
            self._sorted = sorted(self.objects)
        names: list[str] = []
        at = bisect.bisect_left(self._sorted, prefix)
        while at < len(self._sorted) and self._sorted[at].startswith(prefix):
            head, slash, _ = self._sorted[at][len(prefix) :].partition("/")
            names.append(prefix + head + slash)
            at = bisect.bisect_left(self._sorted, prefix + head + "0", at) if slash else at + 1  # "0" follows "/"
        return names

    async def read(self, info: ObjectInfo, byte_range: ByteRange) -> bytes:
        self.reads.append((info.key, byte_range.start, byte_range.stop))
        stored = self.objects.get(info.key)
        if stored is None or stored.info.version != info.version:
            raise StaleObjectError(f"{self.store_id}: {info.key!r} is not {info.version} any more")
        return stored.data[byte_range.start : byte_range.stop]

    async def probe(self) -> None:
        return None

    async def close(self) -> None:
        return None
