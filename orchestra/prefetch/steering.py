"""Keeps what is fetched ahead small while somebody waits: notes readers' misses, measures how long their answers and
those of loads and plans take, sets the limits of loads and plans.

A load gives way to readers that miss and to plans that fetch. A plan is kept small always: what it asks for is needed
in its order, and on a link with a queue of a second the next file comes when the link pleases.

Owns: when that is looked at. Leaves to others: what follows from it (squeeze for plans, yielding for loads), the
requests (loading, planned).
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import Protocol

from orchestra.clock import Clock
from orchestra.engine.engine import Access, Engine
from orchestra.fetch.budget import Priority
from orchestra.prefetch.squeeze import Answers, Squeeze, Tick
from orchestra.prefetch.yielding import Yielding

# Three round trips at 50 ms, and a load on a wide link has all of it after seven of these.
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

    def __init__(self, engine: Engine, clock: Clock) -> None:
        self._demand = engine.fetcher.demand
        self._stalls = engine.fetcher.stalls
        self._clock = clock
        self._last_miss_ns = clock.now_ns() - 2 * _WAITING_NS
        self._steered: set[Steered] = set()
        engine.on_access(self._on_miss)

    @asynccontextmanager
    async def steer(self, steered: Steered, squeeze: Squeeze | Yielding) -> AsyncIterator[None]:
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

    async def _steer(self, steered: Steered, squeeze: Squeeze | Yielding) -> None:
        piece_bytes = 0.0
        demand, before = self._demand, self._demand.mark(self._stalls.now_ns())
        while True:
            await asyncio.sleep(TICK_S)
            own, readers = steered.take_answers(), demand.answers(before)
            now = demand.mark(self._stalls.now_ns())
            piece_bytes = _mean_bytes(own) or piece_bytes or _mean_bytes(readers) or 1.0
            is_alike = piece_bytes / 2 <= _mean_bytes(readers) <= piece_bytes * 2
            steered.set_limit(
                squeeze.tick(
                    Tick(
                        own=_seconds(own),
                        readers=_seconds(readers if is_alike else []),
                        in_flight=round(steered.bytes_in_flight / piece_bytes),
                        readers_in_flight=self._in_flight_before(steered, demand.mean_bytes(before, now)) / piece_bytes,
                        readers_wait=self._waits_for(steered),
                    )
                )
            )
            before = now

    def _in_flight_before(self, steered: Steered, readers_bytes: float) -> float:
        """Bytes on their way that are more urgent than those of `steered`."""
        return readers_bytes + sum(one.bytes_in_flight for one in self._steered if one.priority < steered.priority)


def _mean_bytes(answers: list[tuple[int, int]]) -> float:
    return sum(size for _, size in answers) / len(answers) if answers else 0.0


def _seconds(answers: list[tuple[int, int]]) -> Answers:
    return Answers.of([took_ns / 1e9 for took_ns, _ in answers])
