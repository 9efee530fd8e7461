"""Carries out requests: bytes of one version from its store, within the budget. Retries and limits are the store's
wrappers; which blocks to ask for is the engine's choice."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from orchestra.errors import StoreUnavailableError
from orchestra.fetch.budget import ByteBudget, Priority
from orchestra.fetch.demand import DemandMeter
from orchestra.observe.stalls import StallTable
from orchestra.stores.contract import Buffer
from orchestra.stores.limit import PATIENT_URGENCY, URGENCY, hasten
from orchestra.values import ByteRange, ObjectInfo


@dataclass(slots=True)
class FetchStatistics:
    """Counts since the start."""

    requests: int = 0
    bytes_fetched: int = 0
    failures: int = 0
    busy_ns: int = 0  # with at least one request in flight


assert PATIENT_URGENCY == Priority.PLAN, "the store's window and the budget keep room for the same readers"


class ReadsRanges(Protocol):
    """What is asked of a store here; see UnderStore."""

    @property
    def store_id(self) -> str:
        """Names it in an error."""
        ...

    async def read(self, info: ObjectInfo, byte_range: ByteRange) -> Buffer:
        """See UnderStore."""
        ...


class Fetcher:
    """Fetches parts. One event loop."""

    def __init__(self, budget: ByteBudget) -> None:
        self._budget = budget
        self.statistics = FetchStatistics()
        self.stalls = StallTable()
        self.demand = DemandMeter()
        self._asking = 0
        self._asking_since_ns = 0

    def hasten(self, who: object, priority: Priority) -> None:
        """Have the part that a task (or who took under that name) is about to fetch come as early as that priority
        says."""
        self._budget.hasten(who, priority)
        if isinstance(who, asyncio.Task):
            hasten(who, priority)

    def part(
        self, store: ReadsRanges, info: ObjectInfo, byte_range: ByteRange, priority: Priority, marks: list[int]
    ) -> _Part:
        """Give exactly the bytes of `byte_range` to an `async with`; they count against the budget until it is left.

        `marks` gets when the budget let it go and when the bytes were here (see StallTable). Raises what the store
        raises: StaleObjectError, AccessDeniedError, StoreError.
        """
        return _Part(self, store, info, byte_range, priority, marks)

    async def read(
        self, store: ReadsRanges, info: ObjectInfo, byte_range: ByteRange, priority: Priority, marks: list[int]
    ) -> Buffer:
        """What `part` does on entry; the caller gives the bytes back to the budget with `release`."""
        await self._budget.acquire(byte_range.length, priority)
        self.begin(marks)
        URGENCY.set(priority)
        demand = self.demand if priority < Priority.PLAN else None  # readers, and what is read ahead in their files
        if demand is not None:
            demand.begin(byte_range.length, marks[-1])
        is_whole = False
        try:
            data = await store.read(info, byte_range)
            if len(data) != byte_range.length:
                raise StoreUnavailableError(
                    f"{store.store_id}: asked for {byte_range.length} bytes of {info.key!r}, got {len(data)}"
                )
            is_whole = True
        except BaseException:
            self.release(byte_range.length)
            raise
        finally:
            self.end(marks, byte_range.length, is_whole=is_whole)
            if demand is not None:
                demand.end(byte_range.length, marks[-1])
        if demand is not None:
            demand.answered(marks[-1] - marks[-2], byte_range.length)
        return data

    def take(self, who: object, size_bytes: int, priority: Priority, granted: Callable[[], bool]) -> None:
        """See ByteBudget.take: for who asks in another way, between `begin` and `end`."""
        self._budget.take(who, size_bytes, priority, granted)

    def begin(self, marks: list[int]) -> None:
        """Something is asked for; `marks` gets the time."""
        now_ns = self.stalls.now_ns()
        if not self._asking:
            self._asking_since_ns = now_ns
        self._asking += 1
        self.statistics.requests += 1
        marks.append(now_ns)

    def end(self, marks: list[int], size_bytes: int, *, is_whole: bool) -> None:
        """So many bytes came, all of them or none; `marks` gets the time."""
        now_ns = self.stalls.now_ns()
        self._asking -= 1
        if not self._asking:
            self.statistics.busy_ns += now_ns - self._asking_since_ns
        if is_whole:
            self.statistics.bytes_fetched += size_bytes
        else:
            self.statistics.failures += 1
        marks.append(now_ns)

    def release(self, size_bytes: int) -> None:
        """Give back what `read` took of the budget."""
        self._budget.release(size_bytes)


class _Part:
    """The bytes of one request for as long as somebody works with them. (A class: a generator's context manager costs
    ten times as much, and this is entered for every cold file.)"""

    __slots__ = ("_asked", "_fetcher")

    def __init__(self, fetcher: Fetcher, *asked: Any) -> None:
        self._fetcher = fetcher
        self._asked = asked

    async def __aenter__(self) -> Buffer:
        return await self._fetcher.read(*self._asked)

    async def __aexit__(self, *error: object) -> None:
        self._fetcher.release(self._asked[2].length)
