"""Bounds the requests in flight to one store, and asks for less when the store says so.

Owns: the window (additive increase, multiplicative decrease) and whose turn it is (the most urgent, then first come,
first served; the last turns are kept for what somebody waits for). Leaves to others: who is how urgent, and the byte
budget (fetch), trying again (retry.py).
"""

from __future__ import annotations

import asyncio
import dataclasses
import heapq
import itertools
import math
from collections.abc import AsyncIterator, Awaitable, Callable
from contextvars import ContextVar
from typing import Any, TypeVar

from orchestra.stores.carrying import Carrier, as_placing
from orchestra.stores.contract import Buffer, ListPage, UnderStore
from orchestra.stores.counting import StoreStatistics, statistics_of
from orchestra.stores.pages import PagesThrough
from orchestra.stores.translate import ThrottledError
from orchestra.values import ByteRange, ObjectInfo

Answer = TypeVar("Answer")
_Waiter = tuple[int, int, asyncio.Future[None], asyncio.Task[Any]]  # urgency, age, turn, who

# How urgent the requests of the running task are; lower numbers go first. A context variable: the wrappers between the
# one who knows and the window need not.
URGENCY: ContextVar[int] = ContextVar("urgency", default=0)
# From this urgency on nobody waits for the answer, and the last turns of the window are not for such requests.
PATIENT_URGENCY = 2
# Where the tasks wait whose turn has not come, so that `hasten` finds them.
_WAITING: dict[asyncio.Task[Any], RequestWindow] = {}
# Of 128 turns four: a demand then starts at once while a load of 50 kB objects has the other 124, and the load loses
# 3 % of its rate.
_KEPT_RATIO = 1 / 32


def hasten(task: asyncio.Task[Any], urgency: int) -> None:
    """If `task` waits for a turn less urgently than that, let it wait as urgently: a reader wants it by now."""
    window = _WAITING.get(task)
    if window is not None:
        window.hasten(task, urgency)


class RequestWindow:
    """How many requests may be in flight: starts at the maximum, halves when throttled, then grows by one a window.

    Halves once per window of requests: those that were already in flight at a cut were sent under the old limit, and
    their throttling says nothing new. Never below one.
    """

    def __init__(self, requests_max: int) -> None:
        assert requests_max >= 1, "a window of nothing would wait for ever"
        self._requests_max = requests_max
        self._limit = float(requests_max)
        self._cuts = 0
        self.throttled = 0
        self.in_flight = 0
        self._waiters: list[_Waiter] = []
        self._serial = itertools.count()

    @property
    def limit(self) -> int:
        """Requests that may be in flight now."""
        return int(self._limit)

    async def acquire(self, urgency: int = 0) -> int:
        """Wait for a turn; returns the ticket that `release` wants back. Cancelling gives the turn to the next."""
        if self.in_flight < self._limit_for(urgency) and not (self._waiters and self._waiters[0][0] <= urgency):
            self.in_flight += 1
            return self._cuts
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        task = asyncio.current_task()
        assert task is not None, "only tasks wait"
        heapq.heappush(self._waiters, (urgency, next(self._serial), turn, task))
        _WAITING[task] = self
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():  # the turn came and was cancelled in the same step
                self.in_flight -= 1
                self._wake()
            else:
                self._waiters = [waiter for waiter in self._waiters if waiter[2] is not turn]
                heapq.heapify(self._waiters)
            raise
        finally:
            del _WAITING[task]
        return self._cuts

    def hasten(self, task: asyncio.Task[Any], urgency: int) -> None:
        """See the function of that name."""
        hastened = [(min(urgency, one[0]), *one[1:]) if one[3] is task else one for one in self._waiters]
        if hastened != self._waiters:
            self._waiters = hastened
            heapq.heapify(self._waiters)
            self._wake()

    def release(self, ticket: int, *, was_throttled: bool, succeeded: bool) -> None:
        """End a request: adapt the limit to how it went and let others in."""
        self.in_flight -= 1
        if was_throttled:
            self.throttled += 1
            if ticket == self._cuts:
                self._limit = max(1.0, self._limit / 2)
                self._cuts += 1
        elif succeeded:
            self._limit = min(float(self._requests_max), self._limit + 1 / self._limit)
        self._wake()

    def _limit_for(self, urgency: int) -> int:
        if urgency < PATIENT_URGENCY:
            return self.limit
        return self.limit - math.ceil(self.limit * _KEPT_RATIO) if self.limit > 1 else 1

    def _wake(self) -> None:
        while self._waiters and self.in_flight < self._limit_for(self._waiters[0][0]):
            turn = heapq.heappop(self._waiters)[2]
            if not turn.done():
                self.in_flight += 1
                turn.set_result(None)


class LimitedStore:
    """Lets at most the window's number of requests through; a listing takes a turn for each page."""

    def __init__(self, inner: UnderStore, *, requests_max: int) -> None:
        self._inner = inner
        self._placing = as_placing(inner)
        self._window = RequestWindow(requests_max)

    @property
    def store_id(self) -> str:
        return self._inner.store_id

    @property
    def can_place(self) -> bool:
        return self._placing is not None

    def statistics(self) -> StoreStatistics:
        """Return the wrapped store's counts with the window's."""
        return dataclasses.replace(
            statistics_of(self._inner),
            throttled=self._window.throttled,
            requests_in_flight=self._window.in_flight,
            requests_limit=self._window.limit,
        )

    async def _in_turn(self, request: Callable[[], Awaitable[Answer]]) -> Answer:
        ticket = await self._window.acquire(URGENCY.get())
        was_throttled = succeeded = False
        try:
            answer = await request()
            succeeded = True
            return answer
        except ThrottledError:
            was_throttled = True
            raise
        finally:
            self._window.release(ticket, was_throttled=was_throttled, succeeded=succeeded)

    async def head(self, key: str) -> ObjectInfo:
        return await self._in_turn(lambda: self._inner.head(key))

    def list_directory(self, prefix: str) -> AsyncIterator[ListPage]:
        return PagesThrough(self._inner.list_directory(prefix), self._in_turn)

    async def read(self, info: ObjectInfo, byte_range: ByteRange) -> Buffer:
        return await self._in_turn(lambda: self._inner.read(info, byte_range))

    async def place(self, info: ObjectInfo, byte_range: ByteRange, carrier: Carrier) -> None:
        assert self._placing is not None, "can_place says so"
        placing = self._placing
        await self._in_turn(lambda: placing.place(info, byte_range, carrier))

    async def probe(self) -> None:
        await self._in_turn(self._inner.probe)

    async def close(self) -> None:
        await self._inner.close()
