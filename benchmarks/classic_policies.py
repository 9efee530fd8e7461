"""The classic eviction policies as their papers have them, for comparison only: LRU, LFU, 2Q, ARC. Names, not bytes.

Each is a class with `read(name) -> bool` (was it a hit?), which does everything that the policy does on a read.
Belady's rule, which knows the future, is the bound above them.
"""

from __future__ import annotations

import heapq
from collections import OrderedDict, defaultdict, deque
from collections.abc import Sequence


class Lru:
    """Least recently used."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.held: OrderedDict[str, None] = OrderedDict()

    def read(self, name: str) -> bool:
        """See the module."""
        is_hit = name in self.held
        self.held[name] = None
        self.held.move_to_end(name)
        if len(self.held) > self.capacity:
            self.held.popitem(last=False)
        return is_hit


class Lfu:
    """Least frequently used since it came in (ties: the oldest)."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.reads: dict[str, int] = {}
        self.by_reads: defaultdict[int, OrderedDict[str, None]] = defaultdict(OrderedDict)
        self.least = 1

    def read(self, name: str) -> bool:
        """See the module."""
        count = self.reads.get(name, 0)
        if count:
            del self.by_reads[count][name]
            if count == self.least and not self.by_reads[count]:
                self.least += 1
        else:
            if len(self.reads) >= self.capacity:
                victim = self.by_reads[self.least].popitem(last=False)[0]
                del self.reads[victim]
            self.least = 1
        self.reads[name] = count + 1
        self.by_reads[count + 1][name] = None
        return count > 0


class TwoQ:
    """2Q, full version (Johnson and Shasha, VLDB 1994): Kin = 1/4 of the cache, Kout = 1/2 of it."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.fresh: OrderedDict[str, None] = OrderedDict()
        self.ghosts: OrderedDict[str, None] = OrderedDict()
        self.main: OrderedDict[str, None] = OrderedDict()

    def read(self, name: str) -> bool:
        """See the module."""
        if name in self.main:
            self.main.move_to_end(name)
            return True
        if name in self.fresh:
            return True
        if len(self.fresh) + len(self.main) >= self.capacity:
            if len(self.fresh) > self.capacity // 4 or not self.main:
                self.ghosts[self.fresh.popitem(last=False)[0]] = None
                if len(self.ghosts) > self.capacity // 2:
                    self.ghosts.popitem(last=False)
            else:
                self.main.popitem(last=False)
        if name in self.ghosts:
            del self.ghosts[name]
            self.main[name] = None
        else:
            self.fresh[name] = None
        return False


class Arc:
    """Adaptive replacement cache (Megiddo and Modha, FAST 2003)."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.target = 0.0
        self.once: OrderedDict[str, None] = OrderedDict()
        self.twice: OrderedDict[str, None] = OrderedDict()
        self.once_ghosts: OrderedDict[str, None] = OrderedDict()
        self.twice_ghosts: OrderedDict[str, None] = OrderedDict()

    def read(self, name: str) -> bool:
        """See the module."""
        if name in self.once or name in self.twice:
            self.once.pop(name, None)
            self.twice[name] = None
            self.twice.move_to_end(name)
            return True
        if name in self.once_ghosts:
            step = max(1.0, len(self.twice_ghosts) / len(self.once_ghosts))
            self.target = min(self.capacity, self.target + step)
            self._make_room(name)
            del self.once_ghosts[name]
            self.twice[name] = None
        elif name in self.twice_ghosts:
            step = max(1.0, len(self.once_ghosts) / len(self.twice_ghosts))
            self.target = max(0.0, self.target - step)
            self._make_room(name)
            del self.twice_ghosts[name]
            self.twice[name] = None
        else:
            self._admit_new(name)
        return False

    def _admit_new(self, name: str) -> None:
        known_once = len(self.once) + len(self.once_ghosts)
        total = known_once + len(self.twice) + len(self.twice_ghosts)
        if known_once == self.capacity:
            if len(self.once) < self.capacity:
                self.once_ghosts.popitem(last=False)
                self._make_room(name)
            else:
                self.once.popitem(last=False)
        elif total >= self.capacity:
            if total == 2 * self.capacity:
                self.twice_ghosts.popitem(last=False)
            self._make_room(name)
        self.once[name] = None

    def _make_room(self, name: str) -> None:
        if len(self.once) + len(self.twice) < self.capacity:
            return
        is_once = self.once and (
            len(self.once) > self.target or (name in self.twice_ghosts and len(self.once) == self.target)
        )
        if is_once or not self.twice:
            self.once_ghosts[self.once.popitem(last=False)[0]] = None
        else:
            self.twice_ghosts[self.twice.popitem(last=False)[0]] = None


def belady_hits(reads: Sequence[str], capacity: int, first: int) -> int:
    """Return the hits from read `first` on of the best that any policy can do (a newcomer may be refused)."""
    positions: defaultdict[str, deque[int]] = defaultdict(deque)
    for at, name in enumerate(reads):
        positions[name].append(at)
    due: dict[str, int] = {}
    heap: list[tuple[int, str]] = []
    hits = 0
    for at, name in enumerate(reads):
        positions[name].popleft()
        hits += name in due and at >= first
        due[name] = positions[name][0] if positions[name] else len(reads)
        heapq.heappush(heap, (-due[name], name))
        while len(due) > capacity:
            negative_due, victim = heapq.heappop(heap)
            if due.get(victim) == -negative_due:
                del due[victim]
    return hits


CLASSICS = {"LRU": Lru, "LFU": Lfu, "2Q": TwoQ, "ARC": Arc}
