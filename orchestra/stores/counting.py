"""Counts what really goes to the store: wraps the store itself, inside limit and retry, so every attempt counts.

Owns: StoreStatistics, which the other wrappers complete with what they know. Leaves to others: publishing it (observe).
"""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Protocol, TypeVar, runtime_checkable

from orchestra.errors import NotFoundError, OrchestraError
from orchestra.stores.carrying import Errand, NotCarriedError, Outcome, PlacesThrough
from orchestra.stores.contract import Buffer, ListPage, UnderStore
from orchestra.stores.pages import PagesThrough
from orchestra.values import ByteRange, ObjectInfo

Answer = TypeVar("Answer")


@dataclasses.dataclass(frozen=True, slots=True)
class StoreStatistics:
    """What one store was asked since it was opened. Counters only grow; `requests_in_flight` and `_limit` are now."""

    head_requests: int = 0
    list_requests: int = 0
    read_requests: int = 0
    probe_requests: int = 0
    read_bytes: int = 0
    errors: int = 0  # requests that failed; "no such object" is an answer and not among them
    abandoned: int = 0  # requests cancelled or timed out before their answer
    retries: int = 0
    throttled: int = 0
    requests_in_flight: int = 0
    requests_limit: int = 0  # how many may be in flight now; 0 without a limit

    @property
    def requests(self) -> int:
        """All requests, of every kind."""
        return self.head_requests + self.list_requests + self.read_requests + self.probe_requests


@runtime_checkable
class HasStatistics(Protocol):
    """A store that knows what it was asked."""

    def statistics(self) -> StoreStatistics:
        """Return the counts as they are now."""
        ...


def statistics_of(store: UnderStore) -> StoreStatistics:
    """Return the store's counts, zeros for one that does not count."""
    return store.statistics() if isinstance(store, HasStatistics) else StoreStatistics()


class CountingStore(PlacesThrough):
    """Forwards everything and counts it."""

    def __init__(self, inner: UnderStore) -> None:
        super().__init__(inner)
        self._inner = inner
        self._requests = {"head": 0, "list": 0, "read": 0, "probe": 0}
        self._read_bytes = 0
        self._errors = 0
        self._abandoned = 0

    @property
    def store_id(self) -> str:
        return self._inner.store_id

    def statistics(self) -> StoreStatistics:
        """Return the counts as they are now."""
        inner = statistics_of(self._inner)
        return dataclasses.replace(
            inner,
            # A store that needs HEADs to make up a listing (http) counts those itself.
            head_requests=inner.head_requests + self._requests["head"],
            list_requests=self._requests["list"],
            read_requests=self._requests["read"],
            probe_requests=self._requests["probe"],
            read_bytes=self._read_bytes,
            errors=self._errors,
            abandoned=self._abandoned,
        )

    async def _counted(self, kind: str, request: Callable[[], Awaitable[Answer]]) -> Answer:
        self._requests[kind] += 1
        try:
            return await request()
        except NotFoundError:
            raise
        except OrchestraError:
            self._errors += 1
            raise
        except asyncio.CancelledError:
            self._abandoned += 1
            raise
        except StopAsyncIteration:  # the end of a listing was no request
            self._requests[kind] -= 1
            raise

    async def head(self, key: str) -> ObjectInfo:
        return await self._counted("head", lambda: self._inner.head(key))

    def list_directory(self, prefix: str) -> AsyncIterator[ListPage]:
        return PagesThrough(self._inner.list_directory(prefix), lambda request: self._counted("list", request))

    async def read(self, info: ObjectInfo, byte_range: ByteRange) -> Buffer:
        data = await self._counted("read", lambda: self._inner.read(info, byte_range))
        self._read_bytes += len(data)
        return data

    def errand(self, info: ObjectInfo, byte_range: ByteRange) -> Errand | None:
        errand = self.placing.errand(info, byte_range)
        self._requests["read"] += errand is not None
        return errand

    def conclude(self, errand: Errand, info: ObjectInfo, outcome: Outcome) -> None:
        try:
            self.placing.conclude(errand, info, outcome)
        except OrchestraError as error:
            self._errors += not isinstance(error, NotFoundError)
            raise
        except (asyncio.CancelledError, NotCarriedError):
            self._abandoned += 1
            raise
        self._read_bytes += errand.byte_range.length

    async def probe(self) -> None:
        await self._counted("probe", self._inner.probe)

    async def close(self) -> None:
        await self._inner.close()
