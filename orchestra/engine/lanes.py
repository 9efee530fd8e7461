"""The turns of a store that its courier has.

A turn that went back to the daemon between two requests would be idle while three processes take note of it: 9 ms of
62 that a file of 50 kB took at 50 ms. So the courier keeps them as long as there are errands for them.

Owns: how many turns it has, when one more is asked for, and when one is wanted back. Leaves to others: turns
(stores/limit), errands (courier), telling the courier of it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from orchestra.engine.courier_wire import Kind
from orchestra.fetch.budget import Priority
from orchestra.stores.carrying import PlacingStore

# Turns without an errand stay so long with the courier, unless somebody waits for one: the next errands are being made.
_KEPT_IDLE_S = 0.02


class Lane:
    """One store's. One event loop."""

    def __init__(self, store: PlacingStore, tell: Callable[[Kind, int], None]) -> None:
        """`tell` says GRANT and SHED to the courier, of so many turns."""
        self._store = store
        self._tell = tell
        self.errands = 0  # sent to the courier and not ended
        self.turns = 0  # that it has
        self._wanted_back = 0  # of those
        self._is_waiting = False  # for one more
        self._idle: asyncio.TimerHandle | None = None
        self._is_over = False

    def begin(self) -> None:
        """An errand was sent."""
        self.errands += 1
        self._want()

    def end(self, count: int) -> None:
        """So many have ended, whatever came of them."""
        self.errands -= count
        if self._is_over:
            return
        wanted = min(self._wanted_of_us(), self.turns) - self._wanted_back
        if wanted > 0:
            self._want_back(wanted)
        if self._surplus() > 0 and self._idle is None:
            self._idle = asyncio.get_running_loop().call_later(_KEPT_IDLE_S, self._rest)
        self._want()

    def returned(self, count: int) -> None:
        """The courier has given back so many."""
        self.turns -= count
        self._wanted_back -= count
        for _ in range(count):
            self._store.give_turn_back()
        if not self._is_over:
            self._want()  # what was no while it had these may be yes now

    def hasten(self, urgency: int) -> None:
        """Somebody of that urgency waits for an errand, which goes before the others. Where no turn is to stay for it,
        one is asked for as urgently."""
        if self.turns <= self._wanted_back:
            self._store.take_turn(self, urgency, self._take)

    def close(self) -> None:
        """There is no courier any more."""
        self._is_over = True
        if self._idle is not None:
            self._idle.cancel()
        self.returned(self.turns)

    def _surplus(self) -> int:
        return self.turns - self._wanted_back - self.errands

    def _wanted_of_us(self) -> int:
        return self._store.turns_wanted(self, Priority.LOAD, self.turns)

    def _want(self) -> None:
        while not self._is_waiting and self._surplus() < 0:
            self._is_waiting = True
            self._store.take_turn(self, Priority.LOAD, self._granted)

    def _granted(self) -> bool:
        self._is_waiting = False
        return not self._wanted_of_us() and self._take()

    def _take(self) -> bool:
        if self._is_over or self._surplus() >= 0:
            return False
        self.turns += 1
        self._tell(Kind.GRANT, 1)
        return True

    def _rest(self) -> None:
        self._idle = None
        surplus = self._surplus()
        if surplus > 0:
            self._want_back(surplus)

    def _want_back(self, count: int) -> None:
        self._wanted_back += count
        self._tell(Kind.SHED, count)
