"""Keeps loads small while readers wait: counts their misses, measures the rate of all fetching, sets loads' limits.

Owns: when that is looked at. Leaves to others: what follows from it (squeeze), the requests (loading).
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

from orchestra.clock import Clock
from orchestra.engine.engine import Access, Engine
from orchestra.fetch.fetcher import FetchStatistics
from orchestra.prefetch.loading import Loader
from orchestra.prefetch.squeeze import Squeeze

# Five round trips at 50 ms: enough answers for a rate, and a reader's first misses are behind a full window that long.
_TICK_S = 0.25
# How long after a miss readers count as waiting: an epoch whose batches take a second each still does.
_WAITING_NS = 1_000_000_000


class Steering:
    """One per node. One event loop."""

    def __init__(self, engine: Engine, fetched: FetchStatistics, clock: Clock) -> None:
        self._fetched = fetched
        self._clock = clock
        self._last_miss_ns = clock.now_ns() - 2 * _WAITING_NS
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
        try:
            yield
        finally:
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
            loader.set_limit(squeeze.tick(rate, readers_wait=self.readers_wait))
