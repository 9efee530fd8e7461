"""Carries out requests: bytes of one version from its store, within the budget. Retries and limits are the store's
wrappers; which blocks to ask for is the engine's choice."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from orchestra.errors import StoreUnavailableError
from orchestra.fetch.budget import ByteBudget, Priority
from orchestra.fetch.demand import DemandMeter
from orchestra.observe.stalls import StallTable
from orchestra.stores.carrying import Carrier, NotCarriedError, PlacingStore
from orchestra.stores.contract import Buffer
from orchestra.stores.limit import PATIENT_URGENCY, URGENCY, hasten
from orchestra.values import ByteRange, ObjectInfo

Got = TypeVar("Got")


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

    def hasten(self, task: asyncio.Task[Any], priority: Priority) -> None:
        """Have the part that `task` is about to fetch come as early as that priority says."""
        self._budget.hasten(task, priority)
        hasten(task, priority)

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

        async def whole() -> Buffer:
            data = await store.read(info, byte_range)
            if len(data) != byte_range.length:
                raise StoreUnavailableError(
                    f"{store.store_id}: asked for {byte_range.length} bytes of {info.key!r}, got {len(data)}"
                )
            return data

        return await self._asked(whole, byte_range, priority, marks)

    async def place(
        self,
        store: PlacingStore,
        info: ObjectInfo,
        byte_range: ByteRange,
        priority: Priority,
        marks: list[int],
        carrier: Carrier,
    ) -> None:
        """As `read`, with the bytes where `carrier` puts them. Also raises NotCarriedError."""
        await self._asked(lambda: store.place(info, byte_range, carrier), byte_range, priority, marks)

    async def _asked(
        self, ask: Callable[[], Awaitable[Got]], byte_range: ByteRange, priority: Priority, marks: list[int]
    ) -> Got:
        """Ask when the budget lets it. What fails is given back to it, and what was not sent was no request."""
        await self._budget.acquire(byte_range.length, priority)
        marks.append(self._begin_asking())
        self.statistics.requests += 1
        URGENCY.set(priority)
        demand = self.demand if priority < Priority.PLAN else None  # readers, and what is read ahead in their files
        if demand is not None:
            demand.begin(byte_range.length, marks[-1])
        try:
            got = await ask()
        except BaseException as error:
            if isinstance(error, NotCarriedError):
                self.statistics.requests -= 1
            else:
                self.statistics.failures += 1
            self.release(byte_range.length)
            raise
        finally:
            marks.append(self._end_asking())
            if demand is not None:
                demand.end(byte_range.length, marks[-1])
        if demand is not None:
            demand.answered(marks[-1] - marks[-2], byte_range.length)
        self.statistics.bytes_fetched += byte_range.length
        return got

    def _begin_asking(self) -> int:
        now_ns = self.stalls.now_ns()
        if not self._asking:
            self._asking_since_ns = now_ns
        self._asking += 1
        return now_ns

    def _end_asking(self) -> int:
        now_ns = self.stalls.now_ns()
        self._asking -= 1
        if not self._asking:
            self.statistics.busy_ns += now_ns - self._asking_since_ns
        return now_ns

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
