"""Who holds how much of the cache, and letting go of it by owner: the block store's side of pins, quotas and `free`.

Owns: walking over all that is held without holding up who reads and writes. Leaves to others: the accounts, the files.
Thread-safe, under the block store's lock.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Container, Iterable, Mapping
from dataclasses import dataclass

from orchestra.blocks.accounts import Accounts, digest_of
from orchestra.blocks.rules import Origin, SpaceRules

# Extents freed under one hold of the lock: a thousand renames take 10 ms, and readers' misses wait no longer.
_FREED_AT_ONCE = 1000


@dataclass(frozen=True, slots=True)
class Freed:
    """What `free` did, in bytes: dropped, kept because pinned, kept because being written at that moment."""

    freed_bytes: int
    pinned_bytes: int
    busy_bytes: int


class BlockSpace:
    """Asks and changes the accounts by owner."""

    def __init__(
        self,
        accounts: Accounts,
        lock: threading.RLock,
        *,
        busy: Callable[[], Container[str]],
        drop: Callable[[str], list[str]],
        unlink: Callable[[Iterable[str]], None],
    ) -> None:
        """`busy` names what is being written; `drop` makes a name invisible and returns paths for `unlink`."""
        self._accounts = accounts
        self._lock = lock
        self._busy = busy
        self._drop = drop
        self._unlink = unlink
        self.freed_bytes = 0

    def set_rules(self, rules: SpaceRules) -> None:
        """From now on these pins, quotas and ages hold, also for what is held; `keep_limits` then makes room."""
        with self._lock:
            self._accounts.set_rules(rules)

    def expect_copies(self, names: Iterable[str], *, is_copy: bool) -> None:
        """These extents, about to be written or read, are copies of what another node owns, or this node's own."""
        with self._lock:
            for name in names:
                self._accounts.copies.expect(name, is_copy=is_copy)

    def mark_copies(self, marks: Mapping[str, bool]) -> int:
        """Of these extents, as far as they are held, say which are copies of what another node owns; return how many
        are."""
        count = 0
        with self._lock:
            for name, is_copy in marks.items():
                if not is_copy:
                    self._accounts.copies.expect(name, is_copy=False)
                elif self._accounts.size_of(name):
                    self._accounts.copies.mark(name)
                    count += 1
        return count

    def free(self, is_wanted: Callable[[Origin | None], bool], *, pinned: bool = False) -> Freed:
        """Drop the extents whose origin `is_wanted`, but for those being written this moment, and pinned ones unless
        `pinned`. Readers that have them open keep valid bytes."""
        names = self._names_of(is_wanted)
        freed = kept_pinned = kept_busy = 0
        for first in range(0, len(names), _FREED_AT_ONCE):
            retired: list[str] = []
            with self._lock:
                busy = self._busy()
                for name in names[first : first + _FREED_AT_ONCE]:
                    size_bytes = self._accounts.size_of(name)
                    if self._accounts.is_pinned(name) and not pinned:
                        kept_pinned += size_bytes
                    elif name in busy:
                        kept_busy += size_bytes
                    elif size_bytes:
                        freed += size_bytes
                        self.freed_bytes += size_bytes
                        retired += self._drop(name)
            self._unlink(retired)
        return Freed(freed, kept_pinned, kept_busy)

    def held_bytes(self, is_wanted: Callable[[Origin | None], bool]) -> tuple[int, int]:
        """Return the bytes held of origins that `is_wanted`, all versions, and how many of them are pinned."""
        names = self._names_of(is_wanted)
        with self._lock:
            return (
                sum(self._accounts.size_of(name) for name in names),
                sum(self._accounts.size_of(name) for name in names if self._accounts.is_pinned(name)),
            )

    def quota_of(self, store_id: str) -> tuple[int, int, int] | None:
        """Return (limit, used, pinned) bytes of that store's quota, None if it has none."""
        with self._lock:
            return self._accounts.quota_of(store_id)

    def used_by_store(self) -> dict[str, int]:
        """Return the bytes held by store id; "" for what a crash left without an owner."""
        with self._lock:
            return self._accounts.used_by_store()

    def origins(self) -> list[tuple[str, Origin | None]]:
        """Return every extent held, and whose it is as far as that is known."""
        with self._lock:
            return self._accounts.origins()

    def unknown_digests(self) -> set[str]:
        """Return the digests of objects of which a crash lost whose they are."""
        with self._lock:
            return {digest_of(name) for name, origin in self._accounts.origins() if origin is None}

    def learn(self, origins: Mapping[str, Origin]) -> None:
        """Take note of whose the objects with these digests are, where that was lost."""
        with self._lock:
            self._accounts.learn(origins)

    def _names_of(self, is_wanted: Callable[[Origin | None], bool]) -> list[str]:
        with self._lock:
            held = self._accounts.origins()
        return [name for name, origin in held if is_wanted(origin)]  # of a million names in a second: not locked
