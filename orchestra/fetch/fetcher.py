"""Carries out requests: bytes of one version from its store, within the budget. Retries and limits are the store's
wrappers; which blocks to ask for is the engine's choice."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

from orchestra.errors import StoreUnavailableError
from orchestra.fetch.budget import ByteBudget, Priority
from orchestra.stores.contract import Buffer, UnderStore
from orchestra.stores.limit import PATIENT_URGENCY, URGENCY
from orchestra.values import ByteRange, ObjectInfo


@dataclass(slots=True)
class FetchStatistics:
    """Counts since the start."""

    requests: int = 0
    bytes_fetched: int = 0
    failures: int = 0


assert PATIENT_URGENCY == Priority.PLAN, "the store's window and the budget keep room for the same readers"


class Fetcher:
    """Fetches parts. One event loop."""

    def __init__(self, budget: ByteBudget) -> None:
        self._budget = budget
        self.statistics = FetchStatistics()

    def hasten(self, task: asyncio.Task[Any], priority: Priority) -> None:
        """Have the part that `task` is about to fetch come as early as that priority says."""
        self._budget.hasten(task, priority)

    @asynccontextmanager
    async def part(
        self, store: UnderStore, info: ObjectInfo, byte_range: ByteRange, priority: Priority
    ) -> AsyncIterator[Buffer]:
        """Yield exactly the bytes of `byte_range`; they count against the budget until the block is left.

        Raises what the store raises: StaleObjectError, AccessDeniedError, StoreError.
        """
        await self._budget.acquire(byte_range.length, priority)
        try:
            self.statistics.requests += 1
            URGENCY.set(priority)
            try:
                data = await store.read(info, byte_range)
            except BaseException:
                self.statistics.failures += 1
                raise
            if len(data) != byte_range.length:
                raise StoreUnavailableError(
                    f"{store.store_id}: asked for {byte_range.length} bytes of {info.key!r}, got {len(data)}"
                )
            self.statistics.bytes_fetched += byte_range.length
            yield data
        finally:
            self._budget.release(byte_range.length)
