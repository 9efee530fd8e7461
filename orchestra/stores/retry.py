"""Tries again what another try may mend, within a deadline.

Owns: when, how often and how long. Retries StoreUnavailableError and nothing else: a store says by the class of its
error whether a retry is worth it. Leaves to others: the bound of one attempt (timeout.py), the number in flight
(limit.py; a call that waits to be tried again holds no turn).

stamina and tenacity were looked at: neither gives up early when the store asks for a wait beyond the deadline, nor
resumes an iterator, and what remains of them here is ten lines.
"""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import AsyncIterator, Awaitable, Callable
from contextvars import ContextVar
from typing import Protocol, TypeVar

from orchestra.clock import Clock
from orchestra.errors import StoreError, StoreUnavailableError
from orchestra.stores.carrying import PlacesThrough
from orchestra.stores.contract import Buffer, ListPage, UnderStore
from orchestra.stores.counting import StoreStatistics, statistics_of
from orchestra.stores.deadlines import Deadlines
from orchestra.stores.pages import close_pages, is_resumable, patience_for
from orchestra.stores.translate import UnreachableError
from orchestra.units import format_duration
from orchestra.values import ByteRange, ObjectInfo

Answer = TypeVar("Answer")

# What came of a try of the running task's request that was made elsewhere (carrying.py): the next waits as any second
# try does.
TRIED: ContextVar[StoreUnavailableError | None] = ContextVar("tried", default=None)

# How long a server is waited for that takes no connection: a restart passes in that time, and who mistyped an endpoint
# should not wait for the whole deadline of a request that was never sent.
UNREACHABLE_DEADLINE_S = 15.0


@dataclasses.dataclass(frozen=True, slots=True)
class RetryPolicy:
    """`deadline_s` bounds a call with all its tries. The n-th wait is random in [0, min(cap, first * 2^n))."""

    deadline_s: float
    # A load balancer that drops one connection is well again at once, so the first wait is a round trip or two; the
    # cap keeps several tries inside the default deadline of 120 s.
    first_backoff_s: float = 0.1
    backoff_max_s: float = 10.0


def backoff_s(policy: RetryPolicy, tries: int, chance: float) -> float:
    """Return the full-jitter wait after `tries` failed tries, for `chance` in [0, 1)."""
    exponent = min(tries - 1, 30)
    return chance * min(policy.backoff_max_s, policy.first_backoff_s * 2.0**exponent)


class RetryStore(PlacesThrough):
    """Calls the wrapped store until it answers, fails for good, or the deadline has passed.

    The last error then says how many tries were made. Cancelling ends the wait or the attempt at once.
    `sleep` and `chance` (numbers in [0, 1)) are parameters so that tests need not wait.
    """

    def __init__(
        self,
        inner: UnderStore,
        policy: RetryPolicy,
        *,
        clock: Clock,
        chance: Callable[[], float],
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        super().__init__(inner)
        self._inner = inner
        self._policy = policy
        self._clock = clock
        self._chance = chance
        self._sleep = sleep
        self._retries = 0
        self._deadlines = Deadlines()

    @property
    def store_id(self) -> str:
        return self._inner.store_id

    def statistics(self) -> StoreStatistics:
        """Return the wrapped store's counts with the retries."""
        return dataclasses.replace(statistics_of(self._inner), retries=self._retries)

    async def _persist(self, request: Callable[[], Awaitable[Answer]], *, patience: float = 1.0) -> Answer:
        """Call until it answers; `patience` is how many times the usual deadline it may take."""
        started_ns = self._clock.now_ns()
        deadline_s = self._policy.deadline_s * patience
        last, tries = TRIED.get(), 0
        if last is not None:
            TRIED.set(None)
            tries = 1
            await self._wait_for_next_try(last, tries, started_ns, deadline_s)
        while True:
            left_s = deadline_s - (self._clock.now_ns() - started_ns) / 1e9
            bound = self._deadlines.within(left_s)
            try:
                async with bound:
                    return await request()
            except TimeoutError as error:
                if not bound.expired():
                    raise
                message = last.message if last else f"cannot reach {self._inner.store_id}: no answer"
                raise self._gave_up(message, tries + 1, started_ns, deadline_s) from (last or error)
            except StoreUnavailableError as error:
                last = error
                if isinstance(error, UnreachableError):
                    deadline_s = min(deadline_s, UNREACHABLE_DEADLINE_S)
            tries += 1
            await self._wait_for_next_try(last, tries, started_ns, deadline_s)

    async def _wait_for_next_try(
        self, error: StoreUnavailableError, tries: int, started_ns: int, deadline_s: float
    ) -> None:
        wait_s = backoff_s(self._policy, tries, self._chance())
        if error.retry_after_s is not None:
            wait_s = max(wait_s, error.retry_after_s)
        passed_s = (self._clock.now_ns() - started_ns) / 1e9
        if passed_s + wait_s >= deadline_s:
            raise self._gave_up(error.message, tries, started_ns, deadline_s) from error
        self._retries += 1
        await self._sleep(wait_s)

    def _gave_up(self, message: str, tries: int, started_ns: int, deadline_s: float) -> StoreUnavailableError:
        passed = format_duration((self._clock.now_ns() - started_ns) / 1e9)
        times = "1 try" if tries == 1 else f"{tries} tries"
        limit = f"fetch.deadline is {format_duration(deadline_s)}"
        if deadline_s == UNREACHABLE_DEADLINE_S:
            limit = f"a server that takes no connection is waited for {format_duration(deadline_s)} at most"
        return StoreUnavailableError(f"{message} (gave up after {times} in {passed}; {limit})")

    async def head(self, key: str) -> ObjectInfo:
        return await self._persist(lambda: self._inner.head(key))

    def list_directory(self, prefix: str) -> AsyncIterator[ListPage]:
        return _PersistentPages(lambda: self._inner.list_directory(prefix), self._persist)

    async def read(self, info: ObjectInfo, byte_range: ByteRange) -> Buffer:
        return await self._persist(lambda: self._inner.read(info, byte_range))

    async def probe(self) -> None:
        """Not tried again: an operator who waits wants the plain reason now."""
        await self._inner.probe()

    async def close(self) -> None:
        await self._inner.close()


class _Persist(Protocol):
    async def __call__(self, request: Callable[[], Awaitable[ListPage]], *, patience: float) -> ListPage: ...


class _PersistentPages:
    """Asks again for the page that failed; a listing that cannot resume is begun anew only before its first page.

    Beginning anew later would give pages cut at other keys than before, and so names twice or not at all.
    """

    def __init__(
        self,
        start: Callable[[], AsyncIterator[ListPage]],
        persist: _Persist,
    ) -> None:
        self._start = start
        self._persist = persist
        self._pages: AsyncIterator[ListPage] | None = None
        self._pages_seen = 0

    def __aiter__(self) -> _PersistentPages:
        return self

    async def __anext__(self) -> ListPage:
        if self._pages is None and not self._pages_seen:
            self._pages = self._start()
        patience = 1.0 if self._pages is None else patience_for(self._pages)
        page = await self._persist(self._attempt, patience=patience)
        self._pages_seen += 1
        return page

    async def _attempt(self) -> ListPage:
        if self._pages is None:
            if self._pages_seen:
                raise StopAsyncIteration
            self._pages = self._start()
        try:
            return await self._pages.__anext__()
        except StoreUnavailableError as error:
            if is_resumable(self._pages):
                raise
            await close_pages(self._pages)
            self._pages = None
            if self._pages_seen:
                raise _unresumable(error) from error
            raise

    async def aclose(self) -> None:
        """End the listing."""
        if self._pages is not None:
            await close_pages(self._pages)


def _unresumable(error: StoreUnavailableError) -> StoreError:
    return StoreError(f"{error.message} (in the middle of a listing, which this store cannot resume: list again)")
