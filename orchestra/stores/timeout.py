"""Bounds one attempt: a request that does not finish in its time becomes StoreUnavailableError.

Owns: how long an attempt may take. Leaves to others: noticing a stalled connection earlier (clients that can, do, by
the same `attempt_timeout_s`), and what follows (retry.py). Stands inside limit.py, so that waiting for a turn does
not count.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from typing import TypeVar

from orchestra.errors import StoreUnavailableError
from orchestra.stores.carrying import PlacesThrough
from orchestra.stores.contract import Buffer, ListPage, UnderStore
from orchestra.stores.counting import StoreStatistics, statistics_of
from orchestra.stores.deadlines import Deadlines
from orchestra.stores.pages import PagesThrough, patience_for
from orchestra.units import KIB
from orchestra.values import ByteRange, ObjectInfo

Answer = TypeVar("Answer")

# 128 reads of 4 MiB over 100 Mbit/s take 41 s each while all make progress; at this floor such a read is given 62 s
# (32 s and attempt_timeout_s). Only slower than that is "without progress" for clients that cannot tell.
FLOOR_BYTES_PER_S = 128 * KIB


def attempt_limit_s(attempt_timeout_s: float, size_bytes: int) -> float:
    """How long a read of so many bytes may take."""
    return attempt_timeout_s + size_bytes / FLOOR_BYTES_PER_S


class TimeoutStore(PlacesThrough):
    """Gives every request `attempt_timeout_s`, and a read also the time its bytes need at FLOOR_BYTES_PER_S."""

    def __init__(self, inner: UnderStore, *, attempt_timeout_s: float) -> None:
        super().__init__(inner)
        self._inner = inner
        self._attempt_timeout_s = attempt_timeout_s
        self._deadlines = Deadlines()

    @property
    def store_id(self) -> str:
        return self._inner.store_id

    def statistics(self) -> StoreStatistics:
        """Return the wrapped store's counts."""
        return statistics_of(self._inner)

    async def _bounded(self, what: str, limit_s: float, request: Callable[[], Awaitable[Answer]]) -> Answer:
        bound = self._deadlines.within(limit_s)
        try:
            async with bound:
                return await request()
        except TimeoutError as error:
            if not bound.expired():  # a TimeoutError from inside is a store that failed to translate: not ours
                raise
            raise StoreUnavailableError(
                f"cannot {what} in {self._inner.store_id}: no answer within {limit_s:g}s"
            ) from error

    async def head(self, key: str) -> ObjectInfo:
        return await self._bounded(f"look up {key!r}", self._attempt_timeout_s, lambda: self._inner.head(key))

    def list_directory(self, prefix: str) -> AsyncIterator[ListPage]:
        pages = self._inner.list_directory(prefix)
        limit_s = self._attempt_timeout_s * patience_for(pages)
        return PagesThrough(pages, lambda request: self._bounded(f"list {prefix!r}", limit_s, request))

    async def read(self, info: ObjectInfo, byte_range: ByteRange) -> Buffer:
        limit_s = attempt_limit_s(self._attempt_timeout_s, byte_range.length)
        return await self._bounded(f"read {info.key!r}", limit_s, lambda: self._inner.read(info, byte_range))

    async def probe(self) -> None:
        await self._bounded("reach the store", self._attempt_timeout_s, self._inner.probe)

    async def close(self) -> None:
        await self._inner.close()
