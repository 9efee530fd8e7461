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
from functools import partial
from typing import Any, TypeVar

from orchestra.stores.carrying import Errand, Outcome, PlacesThrough
from orchestra.stores.contract import Buffer, ListPage, UnderStore
from orchestra.stores.counting import StoreStatistics, statistics_of
from orchestra.stores.pages import PagesThrough
from orchestra.stores.translate import ThrottledError
from orchestra.values import ByteRange, ObjectInfo

Answer = TypeVar("Answer")
_Waiter = tuple[int, int, Callable[[], bool], object]  # urgency, age, called when its turn is there, who

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


def grant(waiting: asyncio.Future[None]) -> bool:
    """Tell a task that its turn is there; False if it does not wait any more."""
    if waiting.done():
        return False
    waiting.set_result(None)
    return True


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
        if self._is_free(urgency):
            self.in_flight += 1
            return self._cuts
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        task = asyncio.current_task()
        assert task is not None, "only tasks wait"
        granted: Callable[[], bool] = partial(grant, turn)
        heapq.heappush(self._waiters, (urgency, next(self._serial), granted, task))
        _WAITING[task] = self
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():  # the turn came and was cancelled in the same step
                self.in_flight -= 1
                self._wake()
            else:
                self._waiters = [waiter for waiter in self._waiters if waiter[2] is not granted]
                heapq.heapify(self._waiters)
            raise
        finally:
            del _WAITING[task]
        return self._cuts

    def take(self, who: object, urgency: int, granted: Callable[[], bool]) -> None:
        """`acquire` without a task: call `granted` when the turn is there; if it says no, the next has it."""
        if not self._is_free(urgency):
            heapq.heappush(self._waiters, (urgency, next(self._serial), granted, who))
            return
        self.in_flight += 1
        if not granted():
            self.in_flight -= 1

    @property
    def ticket(self) -> int:
        """What `release` wants back for a turn that begins now."""
        return self._cuts

    def wanted_of(self, who: object, urgency: int, turns: int) -> int:
        """How many of the `turns` that `who` keeps from request to request others should have: what more urgent ones
        wait for, what is in flight beyond the limit, and of what is waited for as urgently all above half the limit."""
        others = [waiter[0] for waiter in self._waiters if waiter[3] is not who]
        half = min(self.limit // 2, self._limit_for(urgency) - 1)  # of one turn, or one beside the readers', none
        equal = min(others.count(urgency), turns - half)
        urgent = sum(one < urgency for one in others) + self.in_flight - self._limit_for(urgency)
        return max(0, equal) + max(0, urgent)

    def hasten(self, task: asyncio.Task[Any], urgency: int) -> None:
        """See the function of that name."""
        hastened = [(min(urgency, one[0]), *one[1:]) if one[3] is task else one for one in self._waiters]
        if hastened != self._waiters:
            self._waiters = hastened
            heapq.heapify(self._waiters)
            self._wake()

    def release(self, ticket: int, *, was_throttled: bool, succeeded: bool) -> None:
        """End a request: adapt the limit to how it went and let others in."""
        self.note(ticket, was_throttled=was_throttled, succeeded=succeeded)
        self.give_back()

    def give_back(self) -> None:
        """End a turn and let others in."""
        self.in_flight -= 1
        self._wake()

    def note(self, ticket: int, *, was_throttled: bool, succeeded: bool) -> None:
        """Adapt the limit to how a request went."""
        if was_throttled:
            self.throttled += 1
            if ticket == self._cuts:
                self._limit = max(1.0, self._limit / 2)
                self._cuts += 1
        elif succeeded and self._limit < self._requests_max:
            before = self.limit
            self._limit = min(float(self._requests_max), self._limit + 1 / self._limit)
            if self.limit > before:
                self._wake()  # turns that are kept from request to request do not come back to wake anybody

    def _is_free(self, urgency: int) -> bool:
        return self.in_flight < self._limit_for(urgency) and not (self._waiters and self._waiters[0][0] <= urgency)

    def _limit_for(self, urgency: int) -> int:
        if urgency < PATIENT_URGENCY:
            return self.limit
        return self.limit - math.ceil(self.limit * _KEPT_RATIO) if self.limit > 1 else 1

    def _wake(self) -> None:
        while self._waiters and self.in_flight < self._limit_for(self._waiters[0][0]):
            granted = heapq.heappop(self._waiters)[2]
            self.in_flight += 1
            if not granted():
                self.in_flight -= 1


class LimitedStore(PlacesThrough):
    """Lets at most the window's number of requests through; a listing takes a turn for each page."""

    def __init__(self, inner: UnderStore, *, requests_max: int) -> None:
        super().__init__(inner)
        self._inner = inner
        self._window = RequestWindow(requests_max)

    @property
    def store_id(self) -> str:
        return self._inner.store_id

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

    def take_turn(self, who: object, urgency: int, granted: Callable[[], bool]) -> None:
        self._window.take(who, urgency, granted)

    def give_turn_back(self) -> None:
        self._window.give_back()

    def turns_wanted(self, who: object, urgency: int, turns: int) -> int:
        return self._window.wanted_of(who, urgency, turns)

    def errand(self, info: ObjectInfo, byte_range: ByteRange) -> Errand | None:
        errand = self.placing.errand(info, byte_range)
        if errand is not None:
            errand.ticket = self._window.ticket
        return errand

    def conclude(self, errand: Errand, info: ObjectInfo, outcome: Outcome) -> None:
        was_throttled = succeeded = False
        try:
            self.placing.conclude(errand, info, outcome)
            succeeded = True
        except ThrottledError:
            was_throttled = True
            raise
        finally:
            self._window.note(errand.ticket, was_throttled=was_throttled, succeeded=succeeded)

    async def probe(self) -> None:
        await self._in_turn(self._inner.probe)

    async def close(self) -> None:
        await self._inner.close()
