"""Several stores that hold the same data, tried in order: the quality of a mount with more than one URI."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import TypeVar

from orchestra.errors import OrchestraError, StaleObjectError, StoreError
from orchestra.stores.contract import Buffer, ListPage, UnderStore
from orchestra.stores.counting import StoreStatistics, statistics_of
from orchestra.values import ByteRange, ObjectInfo

log = logging.getLogger(__name__)

T = TypeVar("T")


class FailoverStore:
    """Answers from the first store that can. Its id is the first one's, so the cache is shared whoever answered.

    A version that one store does not have may be another's: a read is stale only when no store has that version.
    """

    def __init__(self, stores: Sequence[UnderStore]) -> None:
        assert len(stores) >= 1
        self._stores = tuple(stores)
        self.failovers = 0

    @property
    def store_id(self) -> str:
        """The first store's id."""
        return self._stores[0].store_id

    def statistics(self) -> StoreStatistics:
        """Return the sum of all stores' counts."""
        rows = [dataclasses.asdict(statistics_of(store)) for store in self._stores]
        return StoreStatistics(**{name: sum(row[name] for row in rows) for name in rows[0]})

    async def head(self, key: str) -> ObjectInfo:
        """See UnderStore. A store that says "not found" has answered."""
        return await self._first(lambda store: store.head(key))

    async def list_directory(self, prefix: str) -> AsyncIterator[ListPage]:
        """See UnderStore. After the first page a failure is final: two stores' pages are never mixed."""
        for at, store in enumerate(self._stores):
            begun = False
            try:
                async for page in store.list_directory(prefix):
                    begun = True
                    yield page
                return
            except StoreError as error:
                if begun or at == len(self._stores) - 1:
                    raise
                self._note(store, error)

    async def read(self, info: ObjectInfo, byte_range: ByteRange) -> Buffer:
        """See UnderStore."""
        return await self._first(lambda store: store.read(info, byte_range))

    async def probe(self) -> None:
        """See UnderStore: fine if any store is."""
        await self._first(lambda store: store.probe())

    async def close(self) -> None:
        """Close all."""
        for store in self._stores:
            await store.close()

    async def _first(self, call: Callable[[UnderStore], Awaitable[T]]) -> T:
        stale: StaleObjectError | None = None
        for at, store in enumerate(self._stores):
            try:
                return await call(store)
            except StaleObjectError as error:
                stale = error
            except (StoreError, PermissionError) as error:
                if at == len(self._stores) - 1:
                    raise stale or error from None
                self._note(store, error)
        assert stale is not None, "the loop ends by a return, a raise or a stale answer"
        raise stale

    def _note(self, store: UnderStore, error: OrchestraError | PermissionError) -> None:
        self.failovers += 1
        log.warning("%s failed (%s); trying the mount's next uri", store.store_id, error)
