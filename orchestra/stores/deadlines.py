"""`asyncio.timeout` for thousands of requests a second: one timer for all of them instead of one each.

Almost no request meets its deadline, and yet two timers were made, pushed on a heap and cancelled for every one: with
what they leave behind in the loop's heap, a twelfth of the CPU of a cold read. Here a request is an entry in a dict,
and a single timer looks through the dict now and then; so a deadline is met up to `_LOOK_RATIO` of its limit late.
"""

from __future__ import annotations

import asyncio
from types import TracebackType

# Deadlines are seconds, and bound what should not happen; 5 % later is as good.
_LOOK_RATIO = 0.05
_LOOK_S_MAX = 1.0


class Deadlines:
    """The requests under way that have a deadline. One event loop."""

    def __init__(self) -> None:
        self._when: dict[_Bound, float] = {}
        self._timer: asyncio.TimerHandle | None = None
        self._look_at = 0.0

    def within(self, limit_s: float) -> _Bound:
        """Return what bounds an `async with` block, as `asyncio.timeout(limit_s)`: TimeoutError, and `expired()`."""
        return _Bound(self, max(0.0, limit_s))

    def add(self, bound: _Bound, limit_s: float) -> None:
        """Begin to watch."""
        loop = asyncio.get_running_loop()
        now = loop.time()
        self._when[bound] = now + limit_s
        # An immediate deadline is the loop's next turn, as with asyncio.timeout(0).
        look_at = now + min(_LOOK_S_MAX, limit_s * (1 + _LOOK_RATIO))
        if self._timer is None or look_at < self._look_at:
            self._look(loop, look_at)

    def remove(self, bound: _Bound) -> None:
        """Stop watching."""
        self._when.pop(bound, None)

    def _look(self, loop: asyncio.AbstractEventLoop, when: float) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._look_at = when
        self._timer = loop.call_at(when, self._expire, loop)

    def _expire(self, loop: asyncio.AbstractEventLoop) -> None:
        self._timer = None
        now = loop.time()
        for bound in [bound for bound, when in self._when.items() if when <= now]:
            del self._when[bound]
            bound.expire(now)
        if self._when:
            next_s = min(self._when.values()) - now
            self._look(loop, now + min(_LOOK_S_MAX, next_s + _LOOK_RATIO * next_s))


class _Bound:
    """An `asyncio.Timeout` that is told when its time has come."""

    __slots__ = ("_deadlines", "_limit_s", "_timeout")

    def __init__(self, deadlines: Deadlines, limit_s: float) -> None:
        self._deadlines = deadlines
        self._limit_s = limit_s
        self._timeout = asyncio.timeout(None)

    def expired(self) -> bool:
        """Whether the time was up."""
        return self._timeout.expired()

    def expire(self, now: float) -> None:
        """The time is up: cancel what the block waits for."""
        self._timeout.reschedule(now)

    async def __aenter__(self) -> None:
        await self._timeout.__aenter__()
        self._deadlines.add(self, self._limit_s)

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._deadlines.remove(self)
        await self._timeout.__aexit__(kind, error, trace)  # raises TimeoutError in place of its own cancellation
