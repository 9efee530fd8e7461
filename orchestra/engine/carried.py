"""Blocks that the courier fetches and writes, from reserving their room to publishing them.

Owns: which parts go that way, and the order of the steps. Leaves to others: the process (courier), turns and signatures
(stores), and all that is unusual: what came to nothing here the engine brings in the usual way.

No task and no coroutine: a block is called on when it may go on. Of a file of 50 kB the daemon does little else than
these steps, and a task's own cost was as much as all of them.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Coroutine
from typing import TYPE_CHECKING, Any

from orchestra.blocks.accounts import CacheFullError
from orchestra.blocks.store import BlockStore, Placed, Placing
from orchestra.engine.courier import Courier
from orchestra.engine.courier_wire import Place
from orchestra.errors import OrchestraError, StoreUnavailableError
from orchestra.fetch.budget import Priority
from orchestra.fetch.fetcher import Fetcher
from orchestra.stores.carrying import Errand, NotCarriedError, PlacingStore
from orchestra.stores.range_client import RangeAnswer
from orchestra.stores.retry import TRIED
from orchestra.values import ByteRange

if TYPE_CHECKING:
    from orchestra.engine.engine import EngineStatistics, Wanted

# Brings a part in the usual way, as early as that says.
Otherwise = Callable[[Priority], Coroutine[Any, Any, bool]]


class CarriedParts:
    """One event loop."""

    def __init__(self, courier: Courier, blocks: BlockStore, fetcher: Fetcher, statistics: EngineStatistics) -> None:
        self.courier = courier
        self.statistics = statistics
        self.blocks = blocks
        self.fetcher = fetcher
        self.under_way: dict[asyncio.Future[bool], _Carriage] = {}

    def takes(self, wanted: Wanted, part: range, priority: Priority) -> bool:
        """Whether that part goes this way: of a load, a block alone. Who waits for one gets it from the daemon."""
        return (
            priority is Priority.LOAD and self.courier.is_ready and len(part) == 1 and wanted.mount.placing is not None
        )

    def start(
        self, wanted: Wanted, block: int, span: ByteRange, marks: list[int], otherwise: Otherwise
    ) -> asyncio.Future[bool]:
        """Have a block of the store's fetched, written and published; return what a task that does so would be.

        Its errors are those of the store. `otherwise` is run, once, if it cannot be done so.
        """
        carriage = _Carriage(self, wanted, block, span, marks, otherwise)
        self.under_way[carriage.flight] = carriage
        carriage.begin()
        return carriage.flight

    def hasten(self, flight: asyncio.Future[bool], priority: Priority) -> bool:
        """Have it come as early as that priority says; False if it is none of these."""
        carriage = self.under_way.get(flight)
        if carriage is None:
            return False
        carriage.hasten(priority)
        return True

    async def close(self) -> None:
        """Take all errands back whose flights were cancelled, which all are by now, and wait for what was run
        otherwise."""
        await asyncio.gather(*(carriage.give_up() for carriage in list(self.under_way.values())))


class _Carriage:
    """One block on its way."""

    __slots__ = (
        "_block",
        "_errand",
        "_is_granted",
        "_marks",
        "_number",
        "_otherwise",
        "_parts",
        "_placing",
        "_span",
        "_store",
        "_task",
        "_urgency",
        "_wanted",
        "flight",
    )

    def __init__(
        self,
        parts: CarriedParts,
        wanted: Wanted,
        block: int,
        span: ByteRange,
        marks: list[int],
        otherwise: Otherwise,
    ) -> None:
        assert wanted.mount.placing is not None, "takes says so"
        self._parts = parts
        self._store: PlacingStore = wanted.mount.placing
        self._wanted = wanted
        self._block = block
        self._span = span
        self._marks = marks
        self._otherwise = otherwise
        self._placing: Placing | None = None
        self._is_granted = False
        self._urgency = Priority.LOAD  # of whoever waits for it
        self._errand: Errand | None = None
        self._number = -1
        self._task: asyncio.Task[bool] | None = None
        self.flight: asyncio.Future[bool] = asyncio.get_running_loop().create_future()

    # -- the steps -------------------------------------------------------------------------------------------------

    def begin(self) -> None:
        """Reserve the room, and wait for the budget."""
        fetcher = self._parts.fetcher
        self._marks.append(fetcher.stalls.now_ns())
        try:
            self._placing = self._parts.blocks.placing(self._wanted.digest, self._wanted.info.size_bytes, self._block)
        except (CacheFullError, OSError):
            self._bring_otherwise()
            return
        fetcher.take(self.flight, self._span.length, Priority.LOAD, self._granted)

    def _granted(self) -> bool:
        """The budget lets it go. Sent ahead of its turn: the courier knows first when one is free."""
        if self.flight.done() or self._placing is None:
            return False
        parts, info = self._parts, self._wanted.info
        errand = self._store.errand(info, self._span) if parts.courier.is_ready else None
        if errand is None:
            self._bring_otherwise()
            return False  # what is brought so asks for itself
        self._is_granted = True
        self._errand = errand
        parts.fetcher.begin(self._marks)
        place = Place(self._wanted.digest, self._block, self._placing.inode)
        self._number = parts.courier.send(self._store, place, errand, self._ended)
        if self._urgency < Priority.LOAD:
            parts.courier.hasten(self._number, self._urgency)
        return True

    def _ended(self, outcome: Placed | RangeAnswer | TimeoutError | NotCarriedError) -> None:
        """The courier has answered, or never will."""
        assert self._errand is not None and self._placing is not None, "this is said once, of what was sent"
        is_placed = isinstance(outcome, Placed)
        self._parts.fetcher.end(self._marks, self._span.length, is_whole=is_placed)
        errand, self._errand = self._errand, None
        try:
            self._store.conclude(errand, self._wanted.info, None if isinstance(outcome, Placed) else outcome)
            if isinstance(outcome, Placed) and self._placing.publish(outcome):
                self._let_go()
                self._parts.statistics.blocks_fetched += 1
                self._over(True)
                return
        except NotCarriedError:
            pass
        except StoreUnavailableError as error:
            self._bring_otherwise(error)
            return
        except OrchestraError as error:
            self._let_go()
            self._over(error)
            return
        self._bring_otherwise()

    # -- other ends ------------------------------------------------------------------------------------------------

    def _bring_otherwise(self, tried: StoreUnavailableError | None = None) -> None:
        """`tried` is what the store answered to the errand: the next try waits as a second one."""
        self._let_go()
        self._marks.clear()

        async def bring() -> bool:
            TRIED.set(tried)
            return await self._otherwise(self._urgency)

        self._task = asyncio.create_task(bring())
        self._task.add_done_callback(self._brought)

    def _brought(self, task: asyncio.Task[bool]) -> None:
        self._over(None if task.cancelled() else task.exception() or task.result())

    def hasten(self, priority: Priority) -> None:
        """Wherever it waits, and will wait."""
        self._urgency = min(self._urgency, priority)
        if self._task is not None:
            self._parts.fetcher.hasten(self._task, priority)
        elif priority >= Priority.LOAD:
            return  # another load: as urgent as it is
        elif self._errand is not None:
            self._parts.courier.hasten(self._number, priority)
        else:
            self._parts.fetcher.hasten(self.flight, priority)

    async def give_up(self) -> None:
        """Its flight was cancelled: nobody waits for it any more."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])
            return
        if self._errand is not None:
            errand, self._errand = self._errand, None
            self._parts.courier.take_back(self._number)
            self._parts.fetcher.end(self._marks, 0, is_whole=False)
            with contextlib.suppress(asyncio.CancelledError):
                self._store.conclude(errand, self._wanted.info, asyncio.CancelledError())
        self._let_go()
        self._over(None)

    def _let_go(self) -> None:
        """Of the room and the budget."""
        if self._placing is not None:
            self._placing.close()
            self._placing = None
        if self._is_granted:
            self._is_granted = False
            self._parts.fetcher.release(self._span.length)

    def _over(self, end: bool | BaseException | None) -> None:
        """Let the flight end so; None cancels it."""
        flight = self.flight
        # Gone if it ended and was given up in one turn of the loop.
        self._parts.under_way.pop(flight, None)
        if flight.done():  # cancelled: the node is closing
            return
        if end is None:
            flight.cancel()
        elif isinstance(end, BaseException):
            flight.set_exception(end)
        else:
            flight.set_result(end)
