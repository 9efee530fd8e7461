"""Brings files into the cache, many at a time, behind everything that readers ask for.

Owns: how many pieces are in flight, what becomes of a file whose piece fails, when to stop because the cache is full.
Leaves to others: which files (tree), bytes and their place (engine), what is told to whom (jobs, dataset).

A piece is one request. Files wait in one queue that is refilled page by page; when a piece has ended, the next is
begun. Only what has to wait before it is asked for (for a pace, for a look at files) has a task of its own: a file of
50 kB costs the daemon little more than one would.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from dataclasses import dataclass, replace
from functools import partial
from typing import Protocol

from orchestra.blocks.geometry import Geometry
from orchestra.clock import Clock
from orchestra.engine.engine import Engine, Wanted
from orchestra.errors import NotFoundError, OrchestraError, StaleObjectError
from orchestra.fetch.budget import Priority
from orchestra.fetch.coalesce import PART_SIZE_BYTES
from orchestra.prefetch.pace import Pace
from orchestra.prefetch.tree import Page, TreeFile, file_at
from orchestra.stores.limit import URGENCY
from orchestra.values import ByteRange, EntryKind

# A file that changes this often while it is loaded is reported instead of chased.
_VERSIONS_MAX = 3
# Answers timed between two looks at them; more say nothing new.
ANSWERS_MAX = 1000
# Pieces that are begun, or found to be here, in one turn of the loop: some milliseconds.
_BEGUN_AT_ONCE = 256


class LoadObserver(Protocol):
    """Is told what became of each file. Must not wait or raise."""

    def on_done(self, file: TreeFile) -> None:
        """Every byte of the file is in the cache."""
        ...

    def on_failed(self, path: str, error: OrchestraError) -> None:
        """The file, or the folder, could not be loaded."""
        ...


@dataclass(slots=True)
class _Loading:
    """A file that waits or whose pieces are under way; pieces are cut as they are taken."""

    file: TreeFile
    pieces_left: int
    tries: int
    next_start: int = 0
    is_over: bool = False

    def cut(self, step_bytes: int) -> tuple[Wanted, bool]:
        """Return the next piece, and whether it is the last."""
        whole = self.file.wanted
        if whole.byte_range.length <= step_bytes:
            return whole, True
        stop = whole.byte_range.stop
        start = max(self.next_start, whole.byte_range.start)
        self.next_start = start + step_bytes
        return replace(whole, byte_range=ByteRange(start, min(stop, start + step_bytes))), self.next_start >= stop


_Landing = tuple[_Loading, Wanted, asyncio.Future[bool | OrchestraError]]


class Loader:
    """One load. One event loop; `run` once."""

    def __init__(
        self,
        engine: Engine,
        geometry: Geometry,
        observer: LoadObserver,
        *,
        priority: Priority,
        limit: int,
        clock: Clock,
        pace: Pace | None = None,
        has_room: Callable[[int], bool] = lambda size_bytes: True,
        share: Callable[[TreeFile], list[TreeFile]] = lambda file: [file],
    ) -> None:
        """`limit`: pieces in flight at most. `has_room` is asked before a piece is fetched; the first no ends the
        load. `share` cuts the next version of a file that was replaced to what is loaded here."""
        self._engine = engine
        self._geometry = geometry
        self._observer = observer
        self.priority = priority
        self.limit = limit
        self._pace = pace
        self._has_room = has_room
        self._share = share
        self._waiting: deque[_Loading] = deque()
        self._is_low = asyncio.Event()
        self._running = 0
        self._tasks: asyncio.TaskGroup | None = None
        self._piece_bytes = max(geometry.block_size_bytes, PART_SIZE_BYTES)
        self.pieces_in_flight_max = 0
        self.bytes_done = 0
        self.bytes_in_flight = 0
        self._answers: list[tuple[int, int]] = []  # nanoseconds and bytes of what was fetched since it was asked for
        self._clock = clock
        self.is_full = False
        self._is_ending = False
        self._is_fed = False  # no page is to come
        self._landed: list[_Landing] = []
        self._woken = asyncio.Event()

    async def run(self, pages: AsyncGenerator[Page, None]) -> bool:
        """Load all files of `pages`; False if the cache was full before the end. Raises what `pages` raises.

        Cancelling stops it; requests under way end and are kept.
        """
        URGENCY.set(self.priority)  # of the listings, and of all that is started here
        try:
            async with aclosing(pages), asyncio.TaskGroup() as self._tasks:
                bringing = self._tasks.create_task(self._bring_all())
                async for page in pages:
                    if not self._is_ending:
                        await self._take(page)
                    if self.is_full or self._is_ending:
                        break
                self._is_fed = True
                self._woken.set()
                await bringing
        except BaseExceptionGroup as group:
            raise group.exceptions[0] from group
        return not self.is_full

    def end_early(self) -> None:
        """Begin no more pieces: `run` returns when those under way have ended."""
        self._is_ending = True
        self._waiting.clear()
        self._is_low.set()
        self._woken.set()

    def set_limit(self, limit: int) -> None:
        """Have so many pieces in flight from now on; those under way end by themselves."""
        self.limit = limit
        self._is_low.set()
        self._woken.set()

    def take_answers(self) -> list[tuple[int, int]]:
        """Return how long each piece took that was fetched since the last call, in nanoseconds, and its bytes."""
        answers, self._answers = self._answers, []
        return answers

    # -- filling the queue -----------------------------------------------------------------------------------------

    async def _take(self, page: Page) -> None:
        if page.error is not None:
            self._observer.on_failed(page.path, page.error)
        for file in page.files:
            self._add(file, tries=1)
        self._woken.set()
        # A page is more than a window: with less than that left, the next page is on its way in time.
        while len(self._waiting) > self.limit and not self.is_full:
            self._is_low.clear()
            await self._is_low.wait()

    def _add(self, file: TreeFile, *, tries: int) -> None:
        size = file.wanted.byte_range.length
        if size:
            self._waiting.append(_Loading(file, -(-size // self._piece_bytes), tries))
        else:
            self._observer.on_done(file)

    # -- emptying it -----------------------------------------------------------------------------------------------

    async def _bring_all(self) -> None:
        try:
            while True:
                self._settle()
                if not self._begin_pieces():
                    await asyncio.sleep(0)
                    continue
                is_last = self.is_full or self._is_ending or (self._is_fed and not self._waiting)
                if is_last and not self._running:
                    return
                await self._woken.wait()
                self._woken.clear()
        finally:
            self.end_early()  # nobody waits for what is not going on

    def _begin_pieces(self) -> bool:
        """Begin as many as may be under way; False if others are to have the loop before there are."""
        waiting = self._waiting
        for _ in range(_BEGUN_AT_ONCE):
            if not waiting or self._running >= self.limit or self.is_full:
                return True
            loading = waiting[0]
            wanted, is_last = loading.cut(self._piece_bytes)
            if is_last or loading.is_over:
                waiting.popleft()
                if len(waiting) <= self.limit:
                    self._is_low.set()
            if not loading.is_over:
                self._begin(loading, wanted)
                self.pieces_in_flight_max = max(self.pieces_in_flight_max, self._running)
        return False

    def _begin(self, loading: _Loading, wanted: Wanted) -> None:
        flight: bool | asyncio.Future[bool] | asyncio.Task[bool | OrchestraError]
        size_bytes, begun_ns = wanted.byte_range.length, 0
        is_held = self._engine.holds_some(wanted)
        if is_held and not self._engine.lacks(wanted):
            flight = self._has_room(size_bytes)
        elif is_held or self._pace is not None:
            assert self._tasks is not None, "pieces are begun while it runs"
            flight, size_bytes = self._tasks.create_task(self._bring(wanted)), 0  # it counts itself
        elif not self._has_room(size_bytes):
            flight = False
        else:
            begun_ns = self._begun_ns(wanted)
            flight = self._engine.fetch_soon(wanted, self.priority)
        if isinstance(flight, bool):
            self._take_end(loading, wanted, flight)
            return
        self._running += 1
        self.bytes_in_flight += size_bytes
        flight.add_done_callback(partial(self._land, loading, wanted, size_bytes, begun_ns))

    def _land(
        self,
        loading: _Loading,
        wanted: Wanted,
        size_bytes: int,
        begun_ns: int,
        flight: asyncio.Future[bool | OrchestraError],
    ) -> None:
        self._running -= 1
        self.bytes_in_flight -= size_bytes
        if not flight.cancelled() and flight.exception() is None:
            self._note_answer(begun_ns, size_bytes)
        self._landed.append((loading, wanted, flight))
        self._woken.set()

    def _begun_ns(self, wanted: Wanted) -> int:
        """Now, or 0 where the time would say when a reader asked."""
        return 0 if self._engine.is_coming(wanted) else self._clock.now_ns()

    def _note_answer(self, begun_ns: int, size_bytes: int) -> None:
        if begun_ns and len(self._answers) < ANSWERS_MAX:
            self._answers.append((self._clock.now_ns() - begun_ns, size_bytes))

    def _settle(self) -> None:
        """See what became of the pieces that have landed. Raises what is no error of a file's."""
        landed, self._landed = self._landed, []
        for loading, wanted, flight in landed:
            error = None if flight.cancelled() else flight.exception()
            self._take_end(loading, wanted, error if isinstance(error, OrchestraError) else flight.result())

    def _take_end(self, loading: _Loading, wanted: Wanted, end: bool | OrchestraError) -> None:
        if isinstance(end, StaleObjectError):
            assert self._tasks is not None, "pieces end while it runs"
            self._running += 1
            self._tasks.create_task(self._load_next_version(loading, end))
        elif isinstance(end, OrchestraError):
            self._fail(loading, end)
        elif not end:
            self.is_full = True
            self._is_low.set()
        else:
            self.bytes_done += wanted.byte_range.length
            loading.pieces_left -= 1
            if not loading.pieces_left and not loading.is_over:
                loading.is_over = True
                self._observer.on_done(loading.file)

    async def _bring(self, wanted: Wanted) -> bool | OrchestraError:
        """A piece that has to wait, or be looked for, before it is asked for."""
        size_bytes = wanted.byte_range.length
        try:
            if self._pace is not None:  # what is here takes nothing of the link, and no task
                await asyncio.sleep(self._pace.wait_s(size_bytes))
            if not self._has_room(size_bytes):
                return False
            begun_ns = 0 if self._engine.holds_some(wanted) else self._begun_ns(wanted)
            self.bytes_in_flight += size_bytes
            try:
                # Ends with us, also while it looks at files; what it has begun to fetch goes on.
                is_kept = await self._engine.ensure(wanted, self.priority)
            finally:
                self.bytes_in_flight -= size_bytes
            self._note_answer(begun_ns, size_bytes)
            return is_kept
        except OrchestraError as error:
            return error

    def _fail(self, loading: _Loading, error: OrchestraError) -> None:
        if not loading.is_over:
            loading.is_over = True
            self._observer.on_failed(loading.file.path, error)

    async def _load_next_version(self, loading: _Loading, error: StaleObjectError) -> None:
        """The file was replaced since it was listed: load what is there now."""
        path = loading.file.path
        try:
            if loading.is_over:
                return
            if loading.tries >= _VERSIONS_MAX:
                self._fail(loading, error)
                return
            loading.is_over = True
            entry = await self._engine.stat(path, refresh=True)
            if entry.kind is not EntryKind.FILE:
                raise NotFoundError(f"{path} was replaced by a folder while it was loaded")
            for file in self._share(file_at(self._engine, path, entry)):
                self._add(file, tries=loading.tries + 1)
        except OrchestraError as gone:
            self._observer.on_failed(path, gone)
        finally:
            self._running -= 1
            self._woken.set()
