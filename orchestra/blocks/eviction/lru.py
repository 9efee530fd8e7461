"""Least recently used first, and the policy that never evicts for a newcomer."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator


class LruPolicy:
    """Names in order of use, the oldest first. An OrderedDict: a plain dict walks over its deleted front entries."""

    def __init__(self) -> None:
        self._order: OrderedDict[str, None] = OrderedDict()

    def add(self, name: str) -> None:
        """See EvictionPolicy."""
        self._order[name] = None
        self._order.move_to_end(name)

    def touch(self, name: str) -> None:
        """See EvictionPolicy."""
        if name in self._order:
            self.add(name)

    def remove(self, name: str) -> None:
        """See EvictionPolicy."""
        self._order.pop(name, None)

    def evict(self, name: str) -> None:
        """See EvictionPolicy."""
        self.remove(name)

    def admits(self, name: str) -> bool:
        """See EvictionPolicy: whatever is read now is worth more than what was not for longest."""
        return True

    def victims(self) -> Iterator[str]:
        """See EvictionPolicy."""
        return iter(self._order)

    def __len__(self) -> int:
        return len(self._order)


class NeverPolicy(LruPolicy):
    """Keeps what came first: once the space is full, nothing new is kept.

    The right one for a data set larger than the cache that is read whole, over and over: its hit ratio is the cached
    share, which nothing beats without knowing the order, and nothing is written after the first epoch. What leaves for
    another reason (the free-space floor, a quota that shrank) leaves in order of use.
    """

    def admits(self, name: str) -> bool:
        """See EvictionPolicy."""
        return False
