"""Least recently used first."""

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

    def victims(self) -> Iterator[str]:
        """See EvictionPolicy."""
        return iter(self._order)

    def __len__(self) -> int:
        return len(self._order)
