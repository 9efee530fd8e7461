"""A budget of bytes in flight, granted in order of urgency. One event loop."""

from __future__ import annotations

import asyncio
import heapq
import itertools
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import IntEnum
from functools import partial

from orchestra.stores.limit import grant


class Priority(IntEnum):
    """What is waited for comes first. Lower numbers are more urgent."""

    DEMAND = 0
    READAHEAD = 1
    PLAN = 2
    LOAD = 3
    BACKGROUND = 4


# What is fetched ahead of any reader leaves this much of the budget alone, so that a demand need not wait for its end:
# of 128 MiB that is 16, four blocks, and 112 in flight still fill 1.2 GB/s at 50 ms and 90 MB/s a connection.
_KEPT_FOR_READERS_RATIO = 1 / 8


@dataclass(order=True, slots=True)
class _Waiter:
    priority: int
    serial: int
    size_bytes: int = field(compare=False)
    granted: Callable[[], bool] = field(compare=False)
    who: object = field(compare=False)


class ByteBudget:
    """Bounds bytes in flight; a request larger than the whole budget is granted when nothing else is in flight."""

    def __init__(self, limit_bytes: int) -> None:
        assert limit_bytes > 0
        self._limit = limit_bytes
        self._limit_ahead = limit_bytes - int(limit_bytes * _KEPT_FOR_READERS_RATIO)
        self._used = 0
        self._waiters: list[_Waiter] = []
        self._serial = itertools.count()
        self.peak_bytes = 0

    @property
    def used_bytes(self) -> int:
        """Bytes granted and not given back; zero when nothing is in flight."""
        return self._used

    @property
    def waiting_count(self) -> int:
        """Requests that wait."""
        return len(self._waiters)

    async def acquire(self, size_bytes: int, priority: Priority) -> None:
        """Return when `size_bytes` are granted; the caller gives them back with `release`."""
        if self._is_free(size_bytes, priority):
            self._grant(size_bytes)
            return
        granted: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        waiter = _Waiter(priority, next(self._serial), size_bytes, partial(grant, granted), asyncio.current_task())
        heapq.heappush(self._waiters, waiter)
        self._wake()
        try:
            await granted
        except asyncio.CancelledError:
            if waiter in self._waiters:
                self._waiters.remove(waiter)
                heapq.heapify(self._waiters)
            elif granted.done() and not granted.cancelled():
                self.release(size_bytes)  # granted and cancelled at the same moment
            self._wake()
            raise

    def take(self, who: object, size_bytes: int, priority: Priority, granted: Callable[[], bool]) -> None:
        """`acquire` without a task: call `granted` when they are granted; if it says no, they are not taken."""
        if self._is_free(size_bytes, priority):
            self._grant(size_bytes)
            if not granted():
                self.release(size_bytes)
            return
        heapq.heappush(self._waiters, _Waiter(priority, next(self._serial), size_bytes, granted, who))
        self._wake()

    def release(self, size_bytes: int) -> None:
        """Give back what `acquire` granted."""
        self._used -= size_bytes
        assert self._used >= 0, "more was released than acquired"
        self._wake()

    def hasten(self, who: object, priority: Priority) -> None:
        """If that task, or whoever takes under that name, waits for a grant less urgently than that, let it wait as
        urgently: somebody demands what was only to be read ahead. (It keeps its serial, and so goes before younger
        demands.)"""
        for waiter in self._waiters:
            if waiter.who is who and waiter.priority > priority:
                waiter.priority = priority
                heapq.heapify(self._waiters)
                self._wake()
                return

    def _is_free(self, size_bytes: int, priority: Priority) -> bool:
        return self._fits(size_bytes, priority) and not (self._waiters and self._waiters[0].priority <= priority)

    def _fits(self, size_bytes: int, priority: int) -> bool:
        limit = self._limit if priority < Priority.PLAN else self._limit_ahead
        return self._used + size_bytes <= limit or not self._used

    def _grant(self, size_bytes: int) -> None:
        self._used += size_bytes
        self.peak_bytes = max(self.peak_bytes, self._used)

    def _wake(self) -> None:
        while self._waiters and self._fits(self._waiters[0].size_bytes, self._waiters[0].priority):
            waiter = heapq.heappop(self._waiters)
            self._grant(waiter.size_bytes)
            if not waiter.granted():
                self._used -= waiter.size_bytes
