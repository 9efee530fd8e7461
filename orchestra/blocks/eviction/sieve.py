"""SIEVE: one queue and a hand that passes over what was read again.

Yazhuo Zhang, Juncheng Yang, Yao Yue, Ymir Vigfusson, K. V. Rashmi: "SIEVE is simpler than LRU: an efficient turn-key
eviction algorithm for web caches", NSDI 2024. What differs here: an extent counts as read again only from its second
read on, since its first is the one that it was fetched for. Good for skewed reads; it does not resist scans.
"""

from __future__ import annotations

from collections.abc import Iterator
from enum import Enum


class _Mark(Enum):
    UNREAD = 0  # nobody came for it yet
    READ = 1  # by whom it was fetched for
    VISITED = 2


class _Node:
    __slots__ = ("mark", "name", "newer", "older")

    def __init__(self, name: str) -> None:
        self.name = name
        self.mark = _Mark.UNREAD
        self.newer: _Node = self
        self.older: _Node = self


class SievePolicy:
    """Names in order of arrival, in a ring through `_end` (whose `newer` is the oldest); the hand moves to newer."""

    def __init__(self) -> None:
        self._end = _Node("")
        self._nodes: dict[str, _Node] = {}
        self._hand = self._end

    def add(self, name: str) -> None:
        """See EvictionPolicy."""
        if name in self._nodes:
            return
        node = self._nodes[name] = _Node(name)
        node.older, node.newer = self._end.older, self._end
        node.older.newer = node.newer.older = node

    def touch(self, name: str) -> None:
        """See EvictionPolicy."""
        node = self._nodes.get(name)
        if node is not None:
            node.mark = _Mark.READ if node.mark is _Mark.UNREAD else _Mark.VISITED

    def remove(self, name: str) -> None:
        """See EvictionPolicy."""
        node = self._nodes.pop(name, None)
        if node is None:
            return
        if self._hand is node:
            self._hand = node.newer
        node.older.newer, node.newer.older = node.newer, node.older

    def evict(self, name: str) -> None:
        """See EvictionPolicy."""
        victim = self._nodes.get(name)
        if victim is None:
            return
        # Twice around at most: the first time clears every mark. What may not leave is passed over as it is.
        node = self._hand
        for _ in range(2 * len(self._nodes) + 2):
            if node is victim and node.mark is not _Mark.VISITED:
                break
            if node.mark is _Mark.VISITED:
                node.mark = _Mark.READ
            node = node.newer
        self._hand = victim.newer
        self.remove(name)

    def admits(self, name: str) -> bool:
        """See EvictionPolicy: whatever is new is tried."""
        return True

    def victims(self) -> Iterator[str]:
        """See EvictionPolicy: from the hand around; then what was passed over, in the same order."""
        visited: list[str] = []
        node = self._hand
        for _ in range(len(self._nodes) + 1):
            if node is not self._end:
                if node.mark is _Mark.VISITED:
                    visited.append(node.name)
                else:
                    yield node.name
            node = node.newer
        yield from visited

    def __len__(self) -> int:
        return len(self._nodes)
