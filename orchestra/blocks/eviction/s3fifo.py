"""S3-FIFO: three queues, of which a small one lets scans pass without disturbing what is read again.

Juncheng Yang, Yazhuo Zhang, Ziyue Qiu, Yao Yue, K. V. Rashmi: "FIFO queues are all you need for cache eviction",
SOSP 2023. What differs here: extents are counted, not bytes (the contract has no sizes); and an extent counts as read
again only from its second read on, since its first is the one that it was fetched for.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Iterator

# The paper's values: the small queue's share of the cache, and the most reads that are remembered of one extent.
SMALL_RATIO = 0.1
_READS_MAX = 3
# Read again while in the small queue: to the main one.
_READS_TO_STAY = 1
# Not even read by whom it was fetched for; ahead of its reader, perhaps.
_UNREAD = -1


class S3FifoPolicy:
    """New names go through a small queue; those read again there, or remembered from there, go to the main one."""

    def __init__(self) -> None:
        # Name -> reads since it came or was last passed over; the oldest first.
        self._small: OrderedDict[str, int] = OrderedDict()
        self._main: OrderedDict[str, int] = OrderedDict()
        # What left the small queue unread: as many as the main queue holds.
        self._ghosts: OrderedDict[str, None] = OrderedDict()

    def add(self, name: str) -> None:
        """See EvictionPolicy."""
        if name in self._small or name in self._main:
            return
        if name in self._ghosts:
            del self._ghosts[name]
            self._main[name] = _UNREAD
        else:
            self._small[name] = _UNREAD

    def touch(self, name: str) -> None:
        """See EvictionPolicy."""
        queue = self._small if name in self._small else self._main
        if name in queue:
            queue[name] = min(_READS_MAX, queue[name] + 1)

    def reads_of(self, name: str) -> int:
        """Reads of a held name since it came or was passed over, but for its first: -1 before that; at most 3."""
        return self._small[name] if name in self._small else self._main[name]

    def remove(self, name: str) -> None:
        """See EvictionPolicy."""
        self._small.pop(name, None)
        self._main.pop(name, None)

    def evict(self, name: str) -> None:
        """See EvictionPolicy."""
        if name not in self._small and name not in self._main:
            return
        # Each turn takes one name past the hand, and no name can be passed more often than it was read.
        for _ in range((_READS_MAX + 2) * len(self)):
            if self._pass_one(name):
                break
        if name in self._small:
            self._ghosts[name] = None
            while len(self._ghosts) > max(len(self._main), 1):
                self._ghosts.popitem(last=False)
        self.remove(name)

    def admits(self, name: str) -> bool:
        """See EvictionPolicy: the small queue is for trying what is new."""
        return True

    def victims(self) -> Iterator[str]:
        """See EvictionPolicy."""
        small, main = iter(self._small.items()), iter(self._main.items())
        small_count, main_count = len(self._small), len(self._main)
        behind: deque[tuple[str, int]] = deque()  # what goes to the main queue's end while this is thought through
        while small_count + main_count:
            if self._is_small_due(small_count, main_count):
                name, reads = next(small)
                small_count -= 1
                if reads < _READS_TO_STAY:
                    yield name
                else:
                    main_count += 1
                    behind.append((name, 0))
                continue
            name, reads = next(main, None) or behind.popleft()
            if reads > 0:
                behind.append((name, reads - 1))
            else:
                main_count -= 1
                yield name

    def __len__(self) -> int:
        return len(self._small) + len(self._main)

    @staticmethod
    def _is_small_due(small_count: int, main_count: int) -> bool:
        """Whether the next to leave comes from the small queue."""
        return small_count > 0 and (not main_count or small_count >= SMALL_RATIO * (small_count + main_count))

    def _pass_one(self, victim: str) -> bool:
        """Look at the name that is due: True if it is `victim`; else it goes to an end, as it was read again or may
        not leave."""
        queue = self._small if self._is_small_due(len(self._small), len(self._main)) else self._main
        name, reads = next(iter(queue.items()))
        if name == victim:
            return True
        if queue is self._main:
            self._main[name] = max(0, reads - 1)
            self._main.move_to_end(name)
        elif reads >= _READS_TO_STAY:
            del self._small[name]
            self._main[name] = 0
        else:
            self._small.move_to_end(name)
        return False
