"""Keeps what is fetched ahead small while somebody waits: counts readers' misses, measures the rate of all fetching,
sets the limits of loads and plans.

A load gives way to readers that miss and to plans that fetch. A plan is kept small always: what it asks for is needed
in its order, and on a link with a queue of a second the next file comes when the link pleases.

Owns: when that is looked at. Leaves to others: what follows from it (squeeze), the requests (loading, planned).
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import Protocol

from orchestra.clock import Clock
from orchestra.engine.engine import Access, Engine
from orchestra.fetch.budget import ByteBudget, Priority
from orchestra.fetch.fetcher import FetchStatistics
from orchestra.prefetch.squeeze import Squeeze, Tick

# Three round trips at 50 ms: enough answers for a rate, and a load on a wide link has all of it after five of these.
TICK_S = 0.15
# How long after a miss readers count as waiting: an epoch whose batches take a second each still does.
_WAITING_NS = 1_000_000_000


class Steered(Protocol):
    """What fetches ahead of readers, with a limit of pieces in flight."""

    @property
    def priority(self) -> Priority:
        """How urgent its pieces are."""
        ...

    @property
    def bytes_in_flight(self) -> int:
        """Bytes that it asked for and that have not come."""
        ...

    def set_limit(self, limit: int) -> None:
        """Have so many pieces in flight from now on."""
        ...

    def take_answers(self) -> list[tuple[int, int]]:
        """Return how long each piece took that was fetched since the last call, in nanoseconds, and its bytes."""
        ...


class Steering:
    """One per node. One event loop."""

    def __init__(self, engine: Engine, fetched: FetchStatistics, budget: ByteBudget, clock: Clock) -> None:
        self._fetched = fetched
        self._budget = budget
        self._clock = clock
        self._last_miss_ns = clock.now_ns() - 2 * _WAITING_NS
        self._steered: set[Steered] = set()
        engine.on_access(self._on_miss)

    @asynccontextmanager
    async def steer(self, steered: Steered, squeeze: Squeeze) -> AsyncIterator[None]:
        """Set the limit of `steered` for as long as the block runs; what was learnt stays in `squeeze`."""
        steered.set_limit(squeeze.limit if self._waits_for(steered) else squeeze.limit_max)
        task = asyncio.create_task(self._steer(steered, squeeze))
        self._steered.add(steered)
        try:
            yield
        finally:
            self._steered.discard(steered)
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task

    def _on_miss(self, _: Access) -> None:
        self._last_miss_ns = self._clock.now_ns()

    def _waits_for(self, steered: Steered) -> bool:
        """Whether somebody waits for what comes behind the pieces of `steered`."""
        if steered.priority <= Priority.PLAN or self._clock.now_ns() - self._last_miss_ns < _WAITING_NS:
            return True
        return any(one.priority < steered.priority and one.bytes_in_flight for one in self._steered)

    async def _steer(self, steered: Steered, squeeze: Squeeze) -> None:
        before_ns, before_bytes = self._clock.now_ns(), self._fetched.bytes_fetched
        while True:
            await asyncio.sleep(TICK_S)
            now_ns, fetched = self._clock.now_ns(), self._fetched.bytes_fetched
            rate = (fetched - before_bytes) * 1e9 / max(1, now_ns - before_ns)
            before_ns, before_bytes = now_ns, fetched
            answers = steered.take_answers()
            steered.set_limit(
                squeeze.tick(
                    Tick(
                        rate_bytes_per_s=rate,
                        latency_s=_quick_ns(answers) / 1e9,
                        piece_bytes=sum(size for _, size in answers) / len(answers) if answers else 0.0,
                        readers_in_flight_bytes=self._in_flight_before(steered),
                        readers_wait=self._waits_for(steered),
                    )
                )
            )

    def _in_flight_before(self, steered: Steered) -> int:
        """Bytes on their way that are more urgent than those of `steered`."""
        others = sum(one.bytes_in_flight for one in self._steered if one.priority >= steered.priority)
        return max(0, self._budget.used_bytes - others)


def _quick_ns(answers: list[tuple[int, int]]) -> int:
    """The lowest decile: of the first answers of all, which queue behind one another, the first one."""
    return sorted(answers)[len(answers) // 10][0] if answers else 0
