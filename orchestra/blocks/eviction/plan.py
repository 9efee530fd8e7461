"""Belady's rule for what a plan names: the extent whose next use is furthest leaves first.

Owns: `NextUses`, the value by which whoever knows the order of future reads tells it, and the order that follows.
Leaves to others: making plans (prefetch), extents that no plan names (the fallback policy).

How a plan runner calls it, through the block store (which holds the lock):

    blocks.expect("rank0", 812, names)   # these extents (`BlockStore.names_of`) are read at position 812
    blocks.advance_plan("rank0", 812)    # the reads at positions below 812 are done
    blocks.forget_plan("rank0")          # it ended or was given up

A whole order at once is a `NextUses`, which `PlanPolicy.follow` takes.
"""

from __future__ import annotations

import heapq
from bisect import insort
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from orchestra.blocks.eviction.contract import EvictionPolicy

# Above this many entries that are no longer true for each one that is, the heap is made anew.
_STALE_RATIO_MAX = 4
_STALE_MIN = 1024


@dataclass(frozen=True, slots=True)
class NextUses:
    """The reads to come of one reader, in order: `names[i]` (an extent, `BlockStore.names_of`) at position
    `first + i`. The same name may come again. Pure."""

    names: Sequence[str]
    first: int = 0


@dataclass(slots=True)
class _Plan:
    """What is expected of one reader. `shift` puts its positions on the policy's own time, the furthest reader's."""

    shift: int
    position: int
    ahead: dict[str, list[int]] = field(default_factory=dict)  # name -> its positions to come, the next one first
    steps: list[tuple[int, str]] = field(default_factory=list)  # the same by position, a heap


class PlanPolicy:
    """What no plan names leaves first, as `fallback` orders it; then what is needed furthest in the future.

    Several readers (the ranks of a job, or two jobs) are taken to go on at one pace: an extent is due when the first
    of them needs it.
    """

    def __init__(self, fallback: EvictionPolicy) -> None:
        self._fallback = fallback
        self._plans: dict[str, _Plan] = {}
        self._now = 0
        self._held: set[str] = set()
        # Held names that a plan names, and when they are due; the heap has (-due, name), and entries that are no
        # longer true, which are passed over.
        self._due: dict[str, int] = {}
        self._heap: list[tuple[int, str]] = []

    # -- plans -----------------------------------------------------------------------------------------------------

    def expect(self, reader: str, position: int, names: Iterable[str]) -> None:
        """`reader` will read these extents at `position`, besides what was expected of it before."""
        plan = self._plans.get(reader)
        if plan is None:
            plan = self._plans[reader] = _Plan(self._now - position, position)
        if position < plan.position:
            return
        names = tuple(names)
        for name in names:
            positions = plan.ahead.setdefault(name, [])
            if position not in positions:
                insort(positions, position)
                heapq.heappush(plan.steps, (position, name))
        self._set_due(names)

    def follow(self, reader: str, uses: NextUses) -> None:
        """From now on `reader` is expected to read `uses`, and nothing that was expected before."""
        self.forget(reader)
        self._plans[reader] = _Plan(self._now - uses.first, uses.first)
        for index, name in enumerate(uses.names):
            self.expect(reader, uses.first + index, (name,))

    def advance(self, reader: str, position: int) -> None:
        """`reader` has done its reads below `position`. A reader of whom nothing is expected is ignored."""
        plan = self._plans.get(reader)
        if plan is None:
            return
        plan.position = max(plan.position, position)
        self._now = max(self._now, plan.position + plan.shift)
        passed = []
        while plan.steps and plan.steps[0][0] < plan.position:
            name = heapq.heappop(plan.steps)[1]
            positions = plan.ahead[name]
            del positions[0]
            if not positions:
                del plan.ahead[name]
            passed.append(name)
        self._set_due(passed)

    def forget(self, reader: str) -> None:
        """Nothing is known any more of what `reader` will read."""
        plan = self._plans.pop(reader, None)
        if plan is not None:
            self._set_due(plan.ahead)

    def next_use(self, name: str) -> int | None:
        """In how many reads `name` is due, 0 if at once; None if no plan names it."""
        due = self._due_of(name)
        return None if due is None else max(0, due - self._now)

    # -- the contract ----------------------------------------------------------------------------------------------

    def add(self, name: str) -> None:
        """See EvictionPolicy."""
        if name not in self._held:
            self._held.add(name)
            if self._plans:
                self._set_due((name,))
        if name not in self._due:
            self._fallback.add(name)

    def touch(self, name: str) -> None:
        """See EvictionPolicy."""
        self._fallback.touch(name)

    def remove(self, name: str) -> None:
        """See EvictionPolicy."""
        self._held.discard(name)
        self._due.pop(name, None)
        self._fallback.remove(name)

    def evict(self, name: str) -> None:
        """See EvictionPolicy."""
        self._held.discard(name)
        if self._due.pop(name, None) is None:
            self._fallback.evict(name)

    def admits(self, name: str) -> bool:
        """See EvictionPolicy: if it is needed sooner than the first victim, or as the fallback says."""
        due = self._due_of(name)
        if len(self._fallback):
            return due is not None or self._fallback.admits(name)
        self._drop_stale()
        return due is not None and (not self._heap or due < -self._heap[0][0])

    def victims(self) -> Iterator[str]:
        """See EvictionPolicy."""
        yield from self._fallback.victims()
        # The heap in order without taking it apart: few victims are asked for, and there may be a million names.
        heap = self._heap
        frontier = [(heap[0], 0)] if heap else []
        seen: set[str] = set()
        while frontier:
            (negative_due, name), index = heapq.heappop(frontier)
            for child in range(2 * index + 1, min(2 * index + 3, len(heap))):
                heapq.heappush(frontier, (heap[child], child))
            if self._due.get(name) == -negative_due and name not in seen:
                seen.add(name)
                yield name

    def __len__(self) -> int:
        return len(self._held)

    # -- due -------------------------------------------------------------------------------------------------------

    def _due_of(self, name: str) -> int | None:
        dues = [plan.ahead[name][0] + plan.shift for plan in self._plans.values() if name in plan.ahead]
        return min(dues, default=None)

    def _set_due(self, names: Iterable[str]) -> None:
        """Bring the order in line for those of `names` that are held."""
        for name in names:
            if name not in self._held:
                continue
            due = self._due_of(name)
            before = self._due.get(name)
            if due is None:
                if before is not None:  # planned no more
                    del self._due[name]
                    self._fallback.add(name)
            elif due != before:
                if before is None:
                    self._fallback.remove(name)
                self._due[name] = due
                heapq.heappush(self._heap, (-due, name))
        if len(self._heap) > _STALE_MIN + _STALE_RATIO_MAX * len(self._due):
            self._heap = [(-due, name) for name, due in self._due.items()]
            heapq.heapify(self._heap)

    def _drop_stale(self) -> None:
        while self._heap and self._due.get(self._heap[0][1]) != -self._heap[0][0]:
            heapq.heappop(self._heap)
