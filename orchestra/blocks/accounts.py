"""How much the cache holds, how much it may hold, and what leaves first.

Owns: sizes and order of use, in memory, persisted in batches. Leaves to others: the files themselves (store).
Not thread-safe: the block store calls it under its lock.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Container
from dataclasses import dataclass

from orchestra.blocks.eviction.contract import EvictionPolicy
from orchestra.blocks.eviction.plan import PlanPolicy
from orchestra.blocks.index import BlockIndex, IndexRow


class CacheFullError(Exception):
    """There is no room, not even after evicting what may leave. The engine then serves without caching."""


# What a disk keeps for the cache's own records, presence maps and index, even where no share of it has to stay free.
_RECORDS_BYTES_MAX = 1024 * 1024
_RECORDS_RATIO_MAX = 0.05


@dataclass(frozen=True, slots=True)
class SpaceLimit:
    """What bounds the cache: its own size, the share of its disk that stays free for others, and the disk itself."""

    capacity_bytes: int
    free_space_ratio: float
    statvfs: Callable[[], os.statvfs_result]

    def room_bytes(self, used_bytes: int) -> int:
        """Bytes that may still be added; negative when something must leave."""
        disk = self.statvfs()
        total_bytes = disk.f_blocks * disk.f_frsize
        records_bytes = min(_RECORDS_BYTES_MAX, total_bytes * _RECORDS_RATIO_MAX)
        floor = int(max(total_bytes * self.free_space_ratio, records_bytes))
        return min(self.capacity_bytes - used_bytes, disk.f_bavail * disk.f_frsize - floor)


class Accounts:
    """Sizes by extent name, kept in step with an eviction policy and an index on disk."""

    def __init__(self, policy: EvictionPolicy, limit: SpaceLimit, index: BlockIndex | None = None) -> None:
        self._policy = policy
        self._limit = limit
        self._index = index
        self._sizes: dict[str, int] = {}
        self._last_use: dict[str, int] = {}
        self._use_counter = 0
        self._reserved_bytes = 0
        self._changed: set[str] = set()
        self._removed: set[str] = set()
        self.used_bytes = 0

    def __contains__(self, name: str) -> bool:
        return name in self._sizes

    def __len__(self) -> int:
        return len(self._sizes)

    def names(self) -> list[str]:
        """All names held."""
        return list(self._sizes)

    def size_of(self, name: str) -> int:
        """Bytes charged for that name, 0 if it is not held."""
        return self._sizes.get(name, 0)

    def load(self, rows: list[IndexRow]) -> None:
        """Start from what an earlier daemon wrote, oldest use first."""
        for row in rows:
            self._sizes[row.name] = row.size_bytes
            self._last_use[row.name] = row.last_use
            self._use_counter = max(self._use_counter, row.last_use)
            self._policy.add(row.name)
            self.used_bytes += row.size_bytes

    def room_bytes(self) -> int:
        """Bytes that may be added now without anything leaving, beside what is reserved."""
        return self._limit.room_bytes(self.used_bytes) - self._reserved_bytes

    def choose_victims(self, size_bytes: int, busy: Container[str]) -> list[str]:
        """Return the names that must leave before `size_bytes` can be added; none of `busy`.

        Raises CacheFullError if even that would not make room.
        """
        short = size_bytes + self._reserved_bytes - self._limit.room_bytes(self.used_bytes)
        if short <= 0:
            return []
        # All names are walked over only where that can help: on a disk that others have filled it never does.
        victims = self.choose_oldest(short, busy) if short <= self.used_bytes else []
        short -= sum(self._sizes[name] for name in victims)
        if short > 0:
            raise CacheFullError(f"no room for {size_bytes} bytes: {short} short even if all were evicted")
        return victims

    def choose_oldest(self, size_bytes: int, busy: Container[str]) -> list[str]:
        """Return the first names in the policy's order that hold `size_bytes` together (or all); none of `busy`."""
        victims: list[str] = []
        for name in self._policy.victims():
            if size_bytes <= 0:
                break
            if name not in busy:
                victims.append(name)
                size_bytes -= self._sizes[name]
        return victims

    def reserve(self, size_bytes: int) -> None:
        """Count bytes that are about to be written."""
        self._reserved_bytes += size_bytes

    def settle(self, size_bytes: int) -> None:
        """Take a reservation back, whether the bytes were written (then also `add` or `grow`) or not."""
        self._reserved_bytes -= size_bytes
        assert self._reserved_bytes >= 0, "a reservation was settled twice"

    def grow(self, name: str, size_bytes: int) -> None:
        """Charge `size_bytes` more to `name`, which may be new; it counts as used."""
        self._sizes[name] = self._sizes.get(name, 0) + size_bytes
        self.used_bytes += size_bytes
        self._removed.discard(name)
        self._policy.add(name)
        self._mark_used(name)

    def touch(self, name: str) -> None:
        """`name` was read, whether it is held or not."""
        self._policy.touch(name)
        if name in self._sizes:
            self._mark_used(name)

    @property
    def plans(self) -> PlanPolicy | None:
        """Where readers' plans are told; None if the policy does not follow any."""
        return self._policy if isinstance(self._policy, PlanPolicy) else None

    def remove(self, name: str) -> int:
        """Forget `name`; return the bytes that it was charged."""
        size = self._sizes.pop(name, 0)
        self._last_use.pop(name, None)
        self.used_bytes -= size
        self._policy.remove(name)
        self._changed.discard(name)
        self._removed.add(name)
        return size

    def take_changes(self) -> tuple[list[IndexRow], list[str]]:
        """Return rows to write and names to delete since the last call."""
        rows = [IndexRow(name, self._sizes[name], self._last_use.get(name, 0)) for name in self._changed]
        removed = list(self._removed)
        self._changed.clear()
        self._removed.clear()
        return rows, removed

    def write_changes(self, changes: tuple[list[IndexRow], list[str]]) -> None:
        """Write what `take_changes` returned; may be called outside the lock, by one thread at a time.

        Raises IndexUnavailableError; `put_back` then keeps the changes for the next try.
        """
        if self._index is not None and any(changes):
            self._index.write(*changes)

    def put_back(self, changes: tuple[list[IndexRow], list[str]]) -> None:
        """Have the next `take_changes` return these again, as they are by then."""
        for name in (*(row.name for row in changes[0]), *changes[1]):
            (self._changed if name in self._sizes else self._removed).add(name)

    def _mark_used(self, name: str) -> None:
        self._use_counter += 1
        self._last_use[name] = self._use_counter
        self._changed.add(name)
