"""The data path.

    path -> Location            namespace
         -> RecordEntry         metadata   (asks the store only when what is known is too old)
         -> missing blocks      blocks     (none: a reader would not have asked)
         -> bytes               fetch      (each block once, however many ask)
         -> published           blocks
         -> access              told to whoever listens (prefetch)

Readers of the node never come here for a hit: they read the cache directory themselves.
"""

from __future__ import annotations

import asyncio
import errno
import logging
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol

from orchestra.blocks.accounts import CacheFullError, DiskFullError, NotAdmittedError
from orchestra.blocks.geometry import Geometry
from orchestra.blocks.rules import Origin
from orchestra.blocks.store import BlockStore
from orchestra.engine.carried import CarriedParts
from orchestra.engine.mounted import OpenedMount
from orchestra.errors import (
    NotADirectoryPathError,
    NotFoundError,
    StaleObjectError,
)
from orchestra.fetch.budget import Priority
from orchestra.fetch.coalesce import plan_parts
from orchestra.fetch.fetcher import Fetcher
from orchestra.metadata.catalog import Catalog
from orchestra.metadata.records import Record, RecordEntry
from orchestra.namespace.mounts import Location, MountTable
from orchestra.namespace.paths import normalize_path
from orchestra.observe.stalls import Marks
from orchestra.stores.contract import Buffer
from orchestra.values import ByteRange, EntryKind, ObjectId, ObjectInfo

log = logging.getLogger(__name__)

# Blocks up to this size are written from the loop: a thread's hand-over costs more than 110 kB of memory copy.
_INLINE_WRITE_BYTES_MAX = 256 * 1024
# What a disk says that will say the same of the next block; a lack of descriptors, for one, passes by itself.
_DISK_ERRNOS = (errno.EIO, errno.EROFS)


@dataclass(frozen=True, slots=True)
class Wanted:
    """Bytes of one version of one object, as a reader asks for them."""

    mount: OpenedMount
    info: ObjectInfo
    byte_range: ByteRange
    is_for_peer: bool = False  # asked by another node, which this one must not ask in turn
    _digest: str = field(default="", init=False, repr=False, compare=False)

    @property
    def object_id(self) -> ObjectId:
        """The object's name."""
        return ObjectId(self.mount.store.store_id, self.info.key, self.info.version)

    @property
    def digest(self) -> str:
        """What stands for the object in the cache directory; reckoned once, as every stage asks for it."""
        if not self._digest:
            object.__setattr__(self, "_digest", self.object_id.digest())
        return self._digest


@dataclass(frozen=True, slots=True)
class Access:
    """Told to listeners: a reader missed these blocks."""

    wanted: Wanted
    digest: str
    blocks: range


Bringing = AbstractAsyncContextManager[Buffer, bool | None]


class Sharing(Protocol):
    """What a cluster changes about a miss; see engine/sharing.py."""

    def may_keep(self, digest: str, wanted: Wanted, block: int, *, is_asked_for: bool = False) -> bool:
        """Whether this node is to keep that block at all; `is_asked_for` by somebody's load."""
        ...

    def cut(self, parts: Iterable[range]) -> Iterable[range]:
        """Return the parts as they can be asked of other nodes: each in one extent."""
        ...

    def part(
        self, digest: str, wanted: Wanted, blocks: range, priority: Priority, marks: Marks, *, is_kept: bool = True
    ) -> Bringing:
        """As Fetcher.part, from the blocks' owners or the store; `is_kept` on this node, once they are here."""
        ...

    def hasten(self, flight: asyncio.Future[bool], priority: Priority) -> None:
        """As Fetcher.hasten."""
        ...


@dataclass(slots=True)
class EngineStatistics:
    """Counts since the start."""

    ensures: int = 0
    blocks_fetched: int = 0
    blocks_joined: int = 0
    uncached_bytes: int = 0
    stale_objects: int = 0
    cache_write_errors: int = 0
    disk_errors: int = 0  # of those, the disk's own: it is full, or broken, for every block


class Engine:
    """Makes what readers ask for present. One event loop; bytes move in `writers`."""

    def __init__(
        self,
        mounts: MountTable[OpenedMount],
        catalog: Catalog,
        blocks: BlockStore,
        fetcher: Fetcher,
        geometry: Geometry,
        writers: ThreadPoolExecutor,
    ) -> None:
        self.mounts = mounts
        self._catalog = catalog
        self.blocks = blocks
        self.fetcher = fetcher
        self.geometry = geometry
        self.writers = writers
        # What brings a block, one at a time, by (digest, block index).
        self._flights: dict[tuple[str, int], asyncio.Future[bool]] = {}
        # Since when a reader waits for a flight; the others nobody waits for.
        self._wanted_ns: dict[asyncio.Future[bool], int] = {}
        self._is_closed = False
        # Set where there is a cluster; else every part comes from its store.
        self.sharing: Sharing | None = None
        # Set where loads may have a process of their own for their bytes.
        self.carried: CarriedParts | None = None
        self.stalls = fetcher.stalls
        self._listeners: list[Callable[[Access], None]] = []
        self.statistics = EngineStatistics()

    def on_access(self, listener: Callable[[Access], None]) -> None:
        """Call `listener` for every demand miss, before it is fetched. It must not wait or raise."""
        self._listeners.append(listener)

    # -- metadata --------------------------------------------------------------------------------------------------

    async def stat(self, path: str, *, refresh: bool = False) -> RecordEntry:
        """Return what is at `path`, no older than the mount's freshness. Raises NotFoundError."""
        location = self._locate(path)
        if location is None or not location.key or self.mounts.names_below(normalize_path(path)):
            return RecordEntry(b"", EntryKind.DIRECTORY, 0, 0, "")
        mount = location.mount
        entry = await self._catalog.stat(mount.store, location.key, mount.freshness_s, refresh=refresh)
        if entry is None:
            raise NotFoundError(f"no such file or directory: {path}")
        return entry

    async def list_directory(self, path: str, *, refresh: bool = False) -> Record | None:
        """Return the listing of the directory at `path`; None above all mounts, where only the table knows.

        Raises NotFoundError, NotADirectoryPathError.
        """
        location = self._locate(path)
        if location is None:
            return None
        mount, key = location.mount, location.key
        record = await self._catalog.list_directory(
            mount.store, f"{key}/" if key else "", mount.freshness_s, refresh=refresh
        )
        if not record.count and key and not self.mounts.names_below(normalize_path(path)):
            entry = await self._catalog.stat(mount.store, key, mount.freshness_s, refresh=refresh)
            if entry is None:
                raise NotFoundError(f"no such file or directory: {path}")
            if entry.kind is not EntryKind.DIRECTORY:
                raise NotADirectoryPathError(f"not a directory: {path}")
        return record

    def _locate(self, path: str) -> Location[OpenedMount] | None:
        location = self.mounts.locate(normalize_path(path))
        if location is not None:
            location.mount.check_usable()
        return location

    # -- data ------------------------------------------------------------------------------------------------------

    def want(self, path: str, info_version: str, size_bytes: int, byte_range: ByteRange, *, digest: str = "") -> Wanted:
        """Return what a reader means who opened that version of `path` and calls it `digest` ("": it does not say).

        Raises StaleObjectError if the mount that it was opened through is gone or shows another store now.
        """
        try:
            location = self._locate(path)
        except NotFoundError as error:
            raise StaleObjectError(f"{path} was unmounted after it was opened: {error}") from error
        if location is None or not location.key:
            raise StaleObjectError(f"{path} was opened as a file, and is a mount point now; open it again")
        stop = min(byte_range.stop, size_bytes)
        cut = ByteRange(min(byte_range.start, stop), stop)
        wanted = Wanted(location.mount, ObjectInfo(location.key, size_bytes, 0, info_version), cut)
        # Two stores may call two contents by one version (size and time): their names in the cache differ all the same.
        if digest and wanted.digest != digest:
            raise StaleObjectError(f"{path} was opened from another store than is mounted there now; open it again")
        return wanted

    async def ensure(self, wanted: Wanted, priority: Priority = Priority.DEMAND, *, suspect: bool = False) -> bool:
        """Make the bytes present on this node; True if they are, False if there is no room to keep them.

        `suspect`: a reader found a bad checksum, so what is here is verified first. Raises StaleObjectError (and
        forgets what was known about the key), AccessDeniedError, StoreError. Cancelling leaves fetches running that
        others may wait for.
        """
        self.statistics.ensures += 1
        digest = wanted.digest
        missing = await self._missing(digest, wanted, suspect=suspect)
        if not missing:
            return True
        self._tell_of_miss(wanted, priority)
        if not self._is_kept(digest, wanted, missing[0], is_asked_for=priority is Priority.LOAD):
            return False  # to fetch what cannot be kept would be to fetch it twice
        return await self._all_of(self._join_or_start(digest, wanted, missing, priority))

    def ensure_soon(self, wanted: Wanted, priority: Priority = Priority.DEMAND) -> bool | asyncio.Future[bool]:
        """`ensure` without a task of its own: the answer, or what will give it (or raise it).

        Who asks must not cancel the future: others may wait for the same fetch.
        """
        if self._holds_any(wanted.digest, wanted, self.geometry.blocks_of(wanted.byte_range)):
            return asyncio.ensure_future(self.ensure(wanted, priority))  # files may have to be looked at
        return self.fetch_soon(wanted, priority)

    def fetch_soon(self, wanted: Wanted, priority: Priority) -> bool | asyncio.Future[bool]:
        """`ensure_soon`, of bytes of which nothing is here (`holds_some` says so)."""
        digest = wanted.digest
        touched = self.geometry.blocks_of(wanted.byte_range)
        self.statistics.ensures += 1
        self._tell_of_miss(wanted, priority)
        if not touched:
            return True
        if not self._is_kept(digest, wanted, touched.start, is_asked_for=priority is Priority.LOAD):
            return False
        flights = self._join_or_start(digest, wanted, touched, priority)
        return flights.pop() if len(flights) == 1 else asyncio.ensure_future(self._all_of(flights))

    def _tell_of_miss(self, wanted: Wanted, priority: Priority) -> None:
        if priority is Priority.DEMAND and not wanted.is_for_peer:
            for listener in self._listeners:
                listener(Access(wanted, wanted.digest, self.geometry.blocks_of(wanted.byte_range)))

    def _is_kept(self, digest: str, wanted: Wanted, block: int, *, is_asked_for: bool = False) -> bool:
        """Whether that block would be kept, going by room, eviction policy, pins, quotas and who owns it."""
        if self.sharing is not None and not self.sharing.may_keep(digest, wanted, block, is_asked_for=is_asked_for):
            return False
        origin = Origin(wanted.mount.store.store_id, wanted.info.key)
        return self.blocks.admits(digest, wanted.info.size_bytes, block, origin, is_asked_for=is_asked_for)

    async def _all_of(self, flights: set[asyncio.Future[bool]]) -> bool:
        if len(flights) == 1:  # nearly always: a small object, or one block of a large one
            return await asyncio.shield(next(iter(flights)))
        return all(await asyncio.gather(*(asyncio.shield(flight) for flight in flights)))

    def _note_stale(self, wanted: Wanted) -> None:
        """Who opens the path next must not be given the version that is gone."""
        self.statistics.stale_objects += 1
        self._catalog.forget(wanted.mount.store.store_id, wanted.info.key)

    def in_flight(self, digest: str, block_index: int) -> bool:
        """Whether that block is being fetched."""
        return (digest, block_index) in self._flights

    def is_coming(self, wanted: Wanted) -> bool:
        """Whether the first of these bytes are being fetched."""
        block = wanted.byte_range.start // self.geometry.block_size_bytes
        return self.in_flight(wanted.digest, block)

    def holds_some(self, wanted: Wanted) -> bool:
        """Whether there is a file that may hold some of these bytes; False is certain. Costs no system call."""
        return self._holds_any(wanted.digest, wanted, self.geometry.blocks_of(wanted.byte_range))

    def lacks(self, wanted: Wanted) -> bool:
        """Whether some of these bytes are not here; looks at files where there may be some of them."""
        if not self.holds_some(wanted):
            return True
        touched = self.geometry.blocks_of(wanted.byte_range)
        missing_now = self.blocks.missing_in_filling(wanted.digest, wanted.info.size_bytes, touched)
        if missing_now is not None:
            return bool(missing_now)
        local = self.blocks.open_object(wanted.digest, wanted.info.size_bytes)
        try:
            return bool(local.missing_blocks(wanted.byte_range))
        finally:
            local.close()

    def _holds_any(self, digest: str, wanted: Wanted, blocks: range) -> bool:
        size = wanted.info.size_bytes
        return any(self.blocks.holds(digest, size, first) for first in self._first_of_each_file(blocks))

    async def read_uncached(self, wanted: Wanted) -> AsyncIterator[Buffer]:
        """Yield the bytes straight from the store, in order, part by part: when there is no room to keep them, or
        for a reader that may not read the cache directory."""
        if self.sharing is not None:
            async for data in self._read_uncached_shared(self.sharing, wanted):
                yield data
            return
        part = self.geometry.block_size_bytes
        start = wanted.byte_range.start
        while start < wanted.byte_range.stop:
            piece = ByteRange(start, min(start - start % part + part, wanted.byte_range.stop))
            marks = Marks([self.stalls.now_ns()])
            try:
                async with self.fetcher.part(wanted.mount.store, wanted.info, piece, Priority.DEMAND, marks) as data:
                    marks.append(marks[-1])  # it is not kept: it lands when it is here
                    self.stalls.add_flight(marks[0], marks)
                    self.statistics.uncached_bytes += len(data)
                    yield data
            except StaleObjectError:
                self._note_stale(wanted)
                raise
            start = piece.stop

    async def _read_uncached_shared(self, sharing: Sharing, wanted: Wanted) -> AsyncIterator[Buffer]:
        """Whole blocks, because only those have checksums; one at a time."""
        digest = wanted.digest
        for block in self.geometry.blocks_of(wanted.byte_range):
            whole = self.geometry.block_range(wanted.info.size_bytes, block)
            marks = Marks([self.stalls.now_ns()])
            try:
                part = range(block, block + 1)
                async with sharing.part(digest, wanted, part, Priority.DEMAND, marks, is_kept=False) as data:
                    marks.append(marks[-1])  # it is not kept: it lands when it is here
                    self.stalls.add_flight(marks[0], marks)
                    self.statistics.uncached_bytes += len(data)
                    start = max(wanted.byte_range.start, whole.start) - whole.start
                    yield memoryview(data)[start : min(wanted.byte_range.stop, whole.stop) - whole.start]
            except StaleObjectError:
                self._note_stale(wanted)
                raise

    async def _missing(self, digest: str, wanted: Wanted, *, suspect: bool) -> list[int]:
        """The blocks that are not here, after verifying files that no process of this boot vouches for."""
        size = wanted.info.size_bytes
        touched = self.geometry.blocks_of(wanted.byte_range)
        if not self._holds_any(digest, wanted, touched):
            return list(touched)
        if not suspect:
            missing_now = self.blocks.missing_in_filling(digest, size, touched)
            if missing_now is not None:
                return missing_now
        local = self.blocks.open_object(digest, size)
        try:
            missing = local.missing_blocks(wanted.byte_range)
            # A file that is open is vouched for in this boot: what it lacks was never there.
            doubted = touched if suspect else [block for block in missing if not local.has_file(block)]
            files = {
                block // self.geometry.blocks_per_extent: block
                for block in doubted
                if self.blocks.holds(digest, size, block)
            }
            if not files:
                return missing
            loop = asyncio.get_running_loop()
            for block in files.values():
                await loop.run_in_executor(self.writers, self.blocks.verify, digest, size, block)
            local.close()
            return local.missing_blocks(wanted.byte_range)
        finally:
            local.close()

    def _first_of_each_file(self, blocks: range) -> list[int]:
        return [run.start for _, run in self.geometry.extents_of(blocks)]

    def _join_or_start(
        self, digest: str, wanted: Wanted, missing: Sequence[int], priority: Priority
    ) -> set[asyncio.Future[bool]]:
        flights: set[asyncio.Future[bool]] = set()
        if self._is_closed:  # who was looking at files meanwhile gets what those got who waited
            stopped = asyncio.get_running_loop().create_future()
            stopped.cancel()
            return {stopped}
        absent = []
        for block in missing:
            flight = self._flights.get((digest, block))
            if flight is None:
                absent.append(block)
            else:
                self.statistics.blocks_joined += 1
                if flight not in flights:
                    self._hasten(flight, priority)
                flights.add(flight)
        parts: Iterable[range] = plan_parts(absent, block_size_bytes=self.geometry.block_size_bytes)
        if self.sharing is not None:
            parts = self.sharing.cut(parts)
        for part in parts:
            marks = Marks()
            flight = self._start(digest, wanted, part, priority, marks)
            for block in part:
                self._flights[(digest, block)] = flight
            flight.add_done_callback(partial(self._land, wanted, part, marks))
            flights.add(flight)
        if priority is Priority.DEMAND and not wanted.is_for_peer:
            now_ns = self.stalls.now_ns()
            for waited in flights:
                self._wanted_ns.setdefault(waited, now_ns)
        return flights

    def _start(
        self, digest: str, wanted: Wanted, part: range, priority: Priority, marks: Marks
    ) -> asyncio.Future[bool]:
        bring = partial(self._fetch_part, digest, wanted, part, marks)
        if self.carried is None or self.sharing is not None or not self.carried.takes(wanted, part, priority):
            return asyncio.create_task(bring(priority))
        span = self.geometry.block_range(wanted.info.size_bytes, part.start)
        return self.carried.start(wanted, part.start, span, marks, bring)

    def _hasten(self, flight: asyncio.Future[bool], priority: Priority) -> None:
        if self.carried is not None and self.carried.hasten(flight, priority):
            return
        self.fetcher.hasten(flight, priority)
        if self.sharing is not None:
            self.sharing.hasten(flight, priority)

    def _land(self, wanted: Wanted, part: range, marks: Marks, task: asyncio.Future[bool]) -> None:
        for block in part:
            self._flights.pop((wanted.digest, block), None)
        wanted_ns = self._wanted_ns.pop(task, None)
        if wanted_ns is not None and len(marks) == 3:  # begun, granted, received: else it was stopped before
            marks.append(self.stalls.now_ns())
            self.stalls.add_flight(wanted_ns, marks)
        # Whoever waited has the error, too; a read-ahead that nobody waits for may fail in silence.
        if not task.cancelled() and isinstance(task.exception(), StaleObjectError):
            self._note_stale(wanted)  # before anybody who waited goes on

    async def _fetch_part(self, digest: str, wanted: Wanted, part: range, marks: Marks, priority: Priority) -> bool:
        marks.append(self.stalls.now_ns())
        size = wanted.info.size_bytes
        span = self.geometry.block_range(size, part.start)
        if len(part) > 1:
            span = ByteRange(span.start, self.geometry.block_range(size, part.stop - 1).stop)
        if self.sharing is None:
            brought: Bringing = self.fetcher.part(wanted.mount.store, wanted.info, span, priority, marks)
        else:
            brought = self.sharing.part(digest, wanted, part, priority, marks)
        async with brought as data:
            view = memoryview(data)
            for block in part:
                block_range = self.geometry.block_range(size, block)
                piece = view[block_range.start - span.start : block_range.stop - span.start]
                if not await self._publish(digest, size, block, piece):
                    return False
                self.statistics.blocks_fetched += 1
        return True

    async def _publish(self, digest: str, size_bytes: int, block: int, data: memoryview) -> bool:
        """Write a block; False if it cannot be kept. A failing cache disk makes reads slower, never wrong."""
        try:
            if len(data) <= _INLINE_WRITE_BYTES_MAX:
                self.blocks.write_block(digest, size_bytes, block, data)
            else:
                loop = asyncio.get_running_loop()
                await loop.run_in_executor(self.writers, self.blocks.write_block, digest, size_bytes, block, data)
        except NotAdmittedError as error:
            log.info("not cached: %s", error)  # what is here became worth more while this was on its way
            return False
        except CacheFullError as error:
            self.statistics.cache_write_errors += 1
            self.statistics.disk_errors += isinstance(error, DiskFullError)
            log.warning("not cached: %s", error)
            return False
        except OSError as error:
            self.statistics.cache_write_errors += 1
            self.statistics.disk_errors += error.errno in _DISK_ERRNOS
            log.error("the cache directory cannot be written: %s", error)
            return False
        return True

    async def close(self) -> None:
        """Stop fetches under way and wait until they have let go of their buffers; none is begun from now on."""
        self._is_closed = True
        flights = set(self._flights.values())
        for flight in flights:
            flight.cancel()
        await asyncio.gather(*flights, return_exceptions=True)
        if self.carried is not None:
            await self.carried.close()
        await self._catalog.close()
