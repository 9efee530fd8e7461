"""Keeps loads small while readers wait: counts their misses, measures the rate of all fetching, sets loads' limits.

Owns: when that is looked at. Leaves to others: what follows from it (squeeze), the requests (loading).
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

from orchestra.clock import Clock
from orchestra.engine.engine import Access, Engine
from orchestra.fetch.budget import ByteBudget
from orchestra.fetch.fetcher import FetchStatistics
from orchestra.prefetch.loading import Loader
from orchestra.prefetch.squeeze import Squeeze, Tick

# Three round trips at 50 ms: enough answers for a rate, and a load on a wide link has all of it after five of these.
_TICK_S = 0.15
# How long after a miss readers count as waiting: an epoch whose batches take a second each still does.
_WAITING_NS = 1_000_000_000


class Steering:
    """One per node. One event loop."""

    def __init__(self, engine: Engine, fetched: FetchStatistics, budget: ByteBudget, clock: Clock) -> None:
        self._fetched = fetched
        self._budget = budget
        self._clock = clock
        self._last_miss_ns = clock.now_ns() - 2 * _WAITING_NS
        self._loaders: set[Loader] = set()
        engine.on_access(self._on_miss)

    @property
    def readers_wait(self) -> bool:
        """Whether a reader missed something just now."""
        return self._clock.now_ns() - self._last_miss_ns < _WAITING_NS

    @asynccontextmanager
    async def steer(self, loader: Loader, limit_max: int) -> AsyncIterator[None]:
        """Set the limit of `loader` for as long as the block runs."""
        squeeze = Squeeze(limit_max)
        loader.set_limit(squeeze.limit if self.readers_wait else limit_max)
        task = asyncio.create_task(self._steer(loader, squeeze))
        self._loaders.add(loader)
        try:
            yield
        finally:
            self._loaders.discard(loader)
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task

    def _on_miss(self, _: Access) -> None:
        self._last_miss_ns = self._clock.now_ns()

    async def _steer(self, loader: Loader, squeeze: Squeeze) -> None:
        before_ns, before_bytes = self._clock.now_ns(), self._fetched.bytes_fetched
        while True:
            await asyncio.sleep(_TICK_S)
            now_ns, fetched = self._clock.now_ns(), self._fetched.bytes_fetched
            rate = (fetched - before_bytes) * 1e9 / max(1, now_ns - before_ns)
            before_ns, before_bytes = now_ns, fetched
            answers = loader.take_answers()
            of_loads_bytes = sum(one.bytes_in_flight for one in self._loaders)
            loader.set_limit(
                squeeze.tick(
                    Tick(
                        rate_bytes_per_s=rate,
                        latency_s=_lower_quartile_ns(answers) / 1e9,
                        piece_bytes=sum(size for _, size in answers) / len(answers) if answers else 0.0,
                        readers_in_flight_bytes=max(0, self._budget.used_bytes - of_loads_bytes),
                        readers_wait=self.readers_wait,
                    )
                )
            )


def _lower_quartile_ns(answers: list[tuple[int, int]]) -> int:
    return sorted(answers)[len(answers) // 4][0] if answers else 0
