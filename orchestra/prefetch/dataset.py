"""`prefetch = "dataset"`: the first miss under a mount starts loading the rest of it in the background.

Owns: when that begins, where, when it stops and when it begins again. Leaves to others: the files (tree), the requests
(loading), giving way to readers (steering, priorities).

It loads the folder that is being read, then the folder around it, and so on up to the whole mount: a bucket often holds
more data sets than the one that is trained on. When readers begin to miss elsewhere, it goes on from there.

It takes only space that is free, of the cache and of the mount's quota: it never makes anything leave, and stops when
what is left is hardly more than what readers may bring at the same time. So it cannot thrash: a block comes at most
once by it until somebody else evicts it.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

from orchestra.blocks.geometry import Geometry
from orchestra.clock import Clock
from orchestra.engine.engine import Access, Engine
from orchestra.engine.mounted import OpenedMount
from orchestra.errors import OrchestraError
from orchestra.fetch.budget import Priority
from orchestra.namespace.paths import is_at_or_below, join, parent_and_name
from orchestra.prefetch.loading import Loader
from orchestra.prefetch.steering import Steering
from orchestra.prefetch.tree import Page, TreeFile, walk
from orchestra.prefetch.yielding import Yielding

log = logging.getLogger(__name__)

# Free space that is left alone, beside the piece in hand: room for what readers bring while a window of ours is under
# way. Of a cache of 64 GiB it is the byte budget, of a tiny one, or a tiny quota, a sixteenth.
_MARGIN_RATIO = 1 / 16
# After a run that ended early (a full cache, a store that fails) a miss begins another one no sooner than this.
_PAUSE_NS = 30_000_000_000
# Files missed in a row in one folder that make it turn there: of files read in random order, so many are hardly ever.
_TURN_MISSES = 8
# Failures in a row after which a run ends: the store is down, and readers will hear of it.
_FAILURES_IN_A_ROW_MAX = 50


@dataclass(frozen=True, slots=True)
class DatasetLimits:
    """What bounds it: pieces in flight, and the free space that it leaves (see `_MARGIN_RATIO`)."""

    requests_max: int
    margin_bytes: int


@dataclass(slots=True)
class DatasetStatus:
    """One mount's loading, as `daemon status` shows it. `state`: loading, complete, full, failed, stopped."""

    mount: str
    state: str = "loading"
    runs: int = 1
    files_done: int = 0
    files_failed: int = 0
    bytes_done: int = 0
    in_flight_limit: int = 0
    message: str = ""


class _Run:
    """One mount's run."""

    def __init__(self, mount: OpenedMount, status: DatasetStatus, squeeze: Yielding) -> None:
        self.mount = mount
        self.status = status
        self.squeeze = squeeze
        self.task: asyncio.Task[None] | None = None
        self.loader: Loader | None = None
        self.before = (0, 0, 0)  # files done and failed, and bytes done, by walks that came to their end
        self.done: set[str] = set()  # folders, none of them below another
        self.start = ""  # the folder that is being walked
        self.missed = ""  # the folder around the files that were missed last
        self.missed_files: set[str] = set()  # those files
        self.turned_to: str | None = None  # where readers miss instead of where it loads
        self.ended_ns = 0
        self.failures_in_a_row = 0

    def begin_walk(self, start: str) -> None:
        """What comes now is counted; what was counted before a turn will be walked over, and counted, again."""
        status = self.status
        if self.turned_to is None:
            self.before = (status.files_done, status.files_failed, self.bytes_done)
        status.files_done, status.files_failed, _ = self.before
        self.turned_to = self.loader = None
        self.start = start

    def note_miss(self, folder: str, digest: str) -> None:
        """A reader missed a file in `folder`. If the last ones were all elsewhere, end the walk so as to turn there."""
        if self.turned_to is not None or digest in self.missed_files:
            return
        self.missed = self.missed if self.missed_files else folder
        self.missed_files.add(digest)
        while not is_at_or_below(folder, self.missed):
            self.missed = parent_and_name(self.missed)[0]
        if len(self.missed_files) < _TURN_MISSES:
            return
        self.missed_files.clear()
        is_done = any(is_at_or_below(self.missed, one) for one in self.done)
        if not is_done and not is_at_or_below(self.start, self.missed) and self.loader is not None:
            self.turned_to = self.missed
            self.loader.end_early()

    def has_done(self, start: str) -> None:
        """All below `start` was looked at."""
        self.done = {one for one in self.done if not is_at_or_below(one, start)} | {start}

    @property
    def bytes_done(self) -> int:
        """Bytes that are here, of all that was looked at."""
        return self.before[2] + (self.loader.bytes_done if self.loader is not None else 0)

    def on_done(self, file: TreeFile) -> None:
        """See LoadObserver."""
        self.failures_in_a_row = 0
        self.status.files_done += 1

    def on_failed(self, path: str, error: OrchestraError) -> None:
        """See LoadObserver."""
        self.failures_in_a_row += 1
        self.status.files_failed += 1
        self.status.message = f"{path}: {error}"


class DatasetPrefetch:
    """All mounts of a node. One event loop; every task is waited for by `close`."""

    def __init__(
        self,
        engine: Engine,
        geometry: Geometry,
        steering: Steering,
        clock: Clock,
        limits: DatasetLimits,
        room_bytes: Callable[[str], int],
    ) -> None:
        """`room_bytes`: what may be written now, of the store with that id, without anything having to leave."""
        self._engine = engine
        self._geometry = geometry
        self._steering = steering
        self._clock = clock
        self._limits = limits
        self._room_bytes = room_bytes
        self._runs: dict[str, _Run] = {}
        engine.on_access(self._on_miss)

    @property
    def is_busy(self) -> bool:
        """Whether something is being loaded."""
        return any(run.task is not None for run in self._runs.values())

    def statuses(self) -> list[DatasetStatus]:
        """How far each mount is that was begun."""
        for run in self._runs.values():
            if run.loader is not None:
                run.status.bytes_done, run.status.in_flight_limit = run.bytes_done, run.loader.limit
        return [run.status for run in self._runs.values()]

    async def close(self) -> None:
        """Stop all."""
        tasks = [run.task for run in self._runs.values() if run.task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _on_miss(self, access: Access) -> None:
        mount = access.wanted.mount
        if mount.config.prefetch != "dataset":
            return
        run = self._runs.get(mount.path)
        folder = parent_and_name(join(mount.path, access.wanted.info.key))[0]
        if run is not None and run.task is not None:
            run.note_miss(folder, access.digest)
            return
        if run is not None and not self._may_begin_again(run, mount):
            return
        status = DatasetStatus(mount.path, runs=run.status.runs + 1 if run is not None else 1)
        run = self._runs[mount.path] = _Run(mount, status, Yielding(self._limits.requests_max))
        run.task = asyncio.create_task(self._load(run, folder), name=f"dataset {mount.path}")

    def _may_begin_again(self, run: _Run, mount: OpenedMount) -> bool:
        """After a run: what is missed now was evicted, is new, or did not fit. Not worth a walk at every miss."""
        if run.mount is not mount:
            return True
        is_rested = self._clock.now_ns() - run.ended_ns >= _PAUSE_NS
        return is_rested and self._spare_bytes(mount) > self._margin_bytes(mount)

    async def _load(self, run: _Run, folder: str) -> None:
        """Load `folder`, then the folder around it, up to the whole mount; what is here already costs a look each."""
        status, start = run.status, folder
        try:
            while status.state == "loading":
                is_whole = await self._load_below(run, start)
                if status.state != "loading":
                    break
                if not is_whole:
                    status.state = "full"
                elif run.turned_to is not None:
                    start = run.turned_to
                elif start == run.mount.path:
                    status.state = "complete"
                else:
                    run.has_done(start)
                    start = parent_and_name(start)[0]
        except OrchestraError as error:
            status.state, status.message = "failed", str(error)
        except asyncio.CancelledError:
            status.state = "stopped"
            raise
        finally:
            run.task, run.ended_ns = None, self._clock.now_ns()
            log.info("dataset prefetch of %s: %s, %d files", status.mount, status.state, status.files_done)

    async def _load_below(self, run: _Run, start: str) -> bool:
        run.begin_walk(start)
        loader = run.loader = Loader(
            self._engine,
            self._geometry,
            run,
            priority=Priority.BACKGROUND,
            limit=self._limits.requests_max,
            clock=self._clock,
            # Whether a piece fits beside what is in flight already, ours and readers', without anything leaving.
            has_room=lambda size_bytes: loader.bytes_in_flight + size_bytes <= self._spare_bytes(run.mount),
        )
        async with self._steering.steer(loader, run.squeeze):
            return await loader.run(self._pages(run, start))

    def _spare_bytes(self, mount: OpenedMount) -> int:
        """What of the free space, the cache's and that within the mount's quota, is not left alone."""
        spare_bytes = self._room_bytes(mount.store.store_id) - self._margin_bytes(mount)
        if mount.config.quota_bytes is not None:
            spare_bytes = min(spare_bytes, self._room_bytes("") - self._limits.margin_bytes)
        return spare_bytes

    def _margin_bytes(self, mount: OpenedMount) -> int:
        quota_bytes, margin_bytes = mount.config.quota_bytes, self._limits.margin_bytes
        return margin_bytes if quota_bytes is None else dataset_margin_bytes(quota_bytes, margin_bytes)

    async def _pages(self, run: _Run, start: str) -> AsyncGenerator[Page, None]:
        """The files below `start` that were not looked at yet, until the mount is changed or its store fails and
        fails."""
        async with aclosing(walk(self._engine, start, without=run.done)) as pages:
            async for page in pages:
                if self._engine.mounts.get(run.mount.path) is not run.mount:
                    run.status.state, run.status.message = "stopped", "the mount was changed"
                    return
                if run.failures_in_a_row >= _FAILURES_IN_A_ROW_MAX:
                    run.status.state = "failed"
                    return
                yield self._of_mount(page, run.mount)

    def _of_mount(self, page: Page, mount: OpenedMount) -> Page:
        """Without the files of mounts nested in this one: each mount says for itself what is prefetched."""
        if all(file.wanted.mount is mount for file in page.files):
            return page
        return Page(tuple(file for file in page.files if file.wanted.mount is mount), page.path, page.error)


def dataset_margin_bytes(size_bytes: int, margin_bytes_max: int) -> int:
    """Return the free space that dataset prefetch leaves alone of a cache, or a quota, of that size."""
    return min(margin_bytes_max, int(size_bytes * _MARGIN_RATIO))


def statuses_json(prefetch: DatasetPrefetch) -> list[dict[str, Any]]:
    """Return what `daemon status` shows."""
    return [
        {
            "mount": one.mount,
            "state": one.state,
            "runs": one.runs,
            "files_done": one.files_done,
            "files_failed": one.files_failed,
            "bytes_done": one.bytes_done,
            "in_flight_limit": one.in_flight_limit,
            "message": one.message,
        }
        for one in prefetch.statuses()
    ]
