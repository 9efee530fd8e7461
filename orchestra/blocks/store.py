"""Writing, verifying and evicting blocks; the daemon's side of the cache directory.

Covers: what is held and under way, room for what comes, what is held after a restart. Does not cover: who may take how
much (space, accounts), how files are made and removed (files), reading (reader), which bytes to fetch (engine).

All methods are synchronous and touch only the local disk; they are thread-safe: bytes move outside the lock, names and
accounts change inside it.
"""

# Over 500 lines: a block that another process writes (Placing) takes the same steps as one that is written here.

from __future__ import annotations

import errno
import logging
import os
import resource
import threading
from collections.abc import Sequence
from dataclasses import dataclass

import crc32c

from orchestra.blocks.accounts import Accounts, CacheFullError, DiskFullError, NotAdmittedError, Victims
from orchestra.blocks.disk import Buffer, Disk, LocalDisk
from orchestra.blocks.files import BlockFiles
from orchestra.blocks.formats import PresenceMap
from orchestra.blocks.geometry import Geometry
from orchestra.blocks.index import IndexUnavailableError
from orchestra.blocks.layout import CacheLayout
from orchestra.blocks.reader import LocalObject
from orchestra.blocks.rules import Origin
from orchestra.blocks.scan import find_files
from orchestra.blocks.space import BlockSpace
from orchestra.values import ByteRange

log = logging.getLogger(__name__)

_PAGE_BYTES = 4096
_FULL_ERRNOS = (errno.ENOSPC, errno.EDQUOT)
# What leaves when the disk says it is full although the accounts see room: enough for what writes beside us as well.
_EVICTED_AT_ONCE_BYTES = 1024 * 1024
# Extents kept open between two blocks of a fill: more than any window of streams needs, and at most a quarter of the
# descriptors that the process may have.
_OPEN_EXTENTS_MAX = 128
_OPEN_EXTENTS_RATIO = 0.25
_NO_DESCRIPTOR_ERRNOS = (errno.EMFILE, errno.ENFILE)


@dataclass(slots=True)
class _Filling:
    """An extent that is being filled."""

    fd: int
    marks: PresenceMap
    absent_count: int
    users: int = 0
    is_retired: bool = False  # evicted while a thread was writing: the last user closes it

    def close(self) -> None:
        """Release the descriptor and the mapping; only when nobody uses them."""
        assert not self.users, "a descriptor in use must not be closed: its number may be another file's next"
        os.close(self.fd)
        self.marks.detach()


@dataclass(frozen=True, slots=True)
class BlockStatistics:
    """What the store did since it was opened, and holds now; a snapshot."""

    used_bytes: int
    extents_count: int
    written_bytes: int
    evicted_bytes: int
    evicted_count: int
    corrupt_count: int
    expired_count: int  # of those evicted, left because of their mount's ttl
    freed_bytes: int  # left because somebody said so
    refused_count: int  # were not let in: no room, or not worth another's place
    pinned_bytes: int


@dataclass(slots=True)
class _Room:
    """What is reserved for a block, and whose it is. Given back in the step that counts the block: in between it would
    be counted twice, and of a cache that is full to the last byte something would leave for nothing."""

    charge: int
    owner: Origin | None
    is_reserved: bool = True


@dataclass(slots=True)
class Placed:
    """What another process wrote: a small object, sealed, at `path`, or a block of that checksum into its extent."""

    path: str = ""
    crc: int = 0


class Placing:
    """A block that another process writes, from before it is fetched until it is published; `close` frees what it
    holds. Room is reserved for it, and its extent does not leave meanwhile."""

    __slots__ = ("_block", "_digest", "_filling", "_length", "_name", "_room", "_size", "_store")

    def __init__(self, store: BlockStore, digest: str, size_bytes: int, block_index: int) -> None:
        """Raises OSError, CacheFullError where something would have to leave first."""
        self._store, self._digest, self._size, self._block = store, digest, size_bytes, block_index
        geometry = store._geometry
        self._length = geometry.block_range(size_bytes, block_index).length
        self._name = store._name(digest, size_bytes, block_index)
        self._filling: _Filling | None = None
        with store._lock:
            charge = _charge(self._length)
            if not store._accounts.fits(charge, self._name):
                raise CacheFullError("something has to leave first")
            if not geometry.is_small(size_bytes):
                self._filling = store._use_extent(digest, size_bytes, block_index // geometry.blocks_per_extent)
            self._room = store._reserve(charge, self._name)

    @property
    def inode(self) -> int:
        """Of the extent's file; 0 for a small object, which has none yet."""
        return 0 if self._filling is None else self._filling.marks.header.extent_inode

    def publish(self, placed: Placed) -> bool:
        """Let every process of the node read it; False if it cannot be, or was removed meanwhile."""
        store = self._store
        if self._filling is None:
            try:
                with store._lock:
                    store._publish_small(self._digest, placed.path, self._room)
            except FileNotFoundError:
                return False
            except OSError as error:
                log.warning("%s cannot be put in its place: %s", placed.path, error)
                store._files.unlink([placed.path])
                return False
        elif not store._mark(self._name, self._filling, self._block, placed.crc, self._room):
            return False
        with store._lock:
            store._written += self._length
            store._is_full_known = False
        return True

    def close(self) -> None:
        """Give back what it held, once; be it published or not."""
        store = self._store
        if self._filling is not None:
            store._let_go(self._name, self._filling)
            store._drop_unused(self._name)
        with store._lock:
            store._settle(self._room)


class BlockStore:
    """The blocks of one cache directory, written by this process alone (the owner lock is the caller's business)."""

    def __init__(
        self, layout: CacheLayout, geometry: Geometry, accounts: Accounts, *, boot_id: bytes, disk: Disk | None = None
    ) -> None:
        self._layout = layout
        self._geometry = geometry
        self._accounts = accounts
        self._boot_id = boot_id
        self._files = BlockFiles(layout, geometry, boot_id=boot_id, disk=disk or LocalDisk())
        self._filling: dict[str, _Filling] = {}
        descriptors_max = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        self._open_extents_max = min(_OPEN_EXTENTS_MAX, int(descriptors_max * _OPEN_EXTENTS_RATIO))
        self._lock = threading.RLock()
        self._written = self._evicted = self._evicted_count = self._corrupt = 0
        self._expired_count = self._refused_count = 0
        self.left_count = 0  # extents that left, whatever the reason: while it is the same, nothing has left
        self.space = BlockSpace(accounts, self._lock, busy=self._busy, drop=self._drop, unlink=self._files.unlink)
        self._is_full_known = False  # that there is no room for what is not pinned was said, and is true still

    def statistics(self) -> BlockStatistics:
        """Return a snapshot."""
        with self._lock:
            return BlockStatistics(
                used_bytes=self._accounts.used_bytes,
                extents_count=len(self._accounts),
                written_bytes=self._written,
                evicted_bytes=self._evicted,
                evicted_count=self._evicted_count,
                corrupt_count=self._corrupt,
                expired_count=self._expired_count,
                freed_bytes=self.space.freed_bytes,
                refused_count=self._refused_count,
                pinned_bytes=self._accounts.pinned_bytes,
            )

    def open_object(self, digest: str, size_bytes: int) -> LocalObject:
        """Return a reader of that object; the caller closes it."""
        return LocalObject(self._layout, self._geometry, digest, size_bytes, boot_id=self._boot_id)

    def holds(self, digest: str, size_bytes: int, block_index: int) -> bool:
        """Whether there is a file that may hold the block (of this boot or another)."""
        return self._name(digest, size_bytes, block_index) in self._accounts

    def missing_in_filling(self, digest: str, size_bytes: int, blocks: range) -> list[int] | None:
        """Which of `blocks` are not present, if all lie in one extent that is being filled; else None (look at the
        files). Costs no system call: this is asked for every block of a cold stream."""
        if not blocks or self._geometry.is_small(size_bytes):
            return None
        per_extent = self._geometry.blocks_per_extent
        if blocks.start // per_extent != (blocks.stop - 1) // per_extent:
            return None
        with self._lock:
            filling = self._filling.get(self._name(digest, size_bytes, blocks.start))
            if filling is None or filling.is_retired:
                return None
            return [block for block in blocks if not filling.marks.is_present(block)]

    def room_bytes(self, store_id: str = "") -> int:
        """Bytes (of that store) that may be written now before anything has to leave; negative when something must."""
        with self._lock:
            return self._accounts.room_bytes(store_id)

    def missing_charge(self, digest: str, size_bytes: int, byte_range: ByteRange | None = None) -> int:
        """Bytes that the rest of the object (of whole extents of it) would take on disk, by the accounts; 0 when they
        have all of it. Costs no system call."""
        whole = _charge(size_bytes if byte_range is None else byte_range.length)
        blocks = None if byte_range is None else self._geometry.blocks_of(byte_range)
        return max(0, whole - sum(self._accounts.size_of(name) for name in self.names_of(digest, size_bytes, blocks)))

    def charge_of(self, size_bytes: int) -> int:
        """Bytes that so much data takes on disk."""
        return _charge(size_bytes)

    def touch(self, digest: str, block_index: int) -> None:
        """A reader read that block, which may be here or not."""
        with self._lock:
            # A note does not say how large the object is.
            is_small = digest in self._accounts
            extent = f"{digest}.{block_index // self._geometry.blocks_per_extent}"
            self._accounts.touch(digest if is_small else extent)

    # -- plans -----------------------------------------------------------------------------------------------------

    def names_of(self, digest: str, size_bytes: int, blocks: range | None = None) -> list[str]:
        """Return the extents of an object (of some blocks of it) by the names that plans, policies and accounts use."""
        if self._geometry.is_small(size_bytes):
            return [digest] if size_bytes else []
        blocks = range(self._geometry.block_count(size_bytes)) if blocks is None else blocks
        return [f"{digest}.{index}" for index, _ in self._geometry.extents_of(blocks)]

    def expect(self, reader: str, position: int, names: Sequence[str]) -> None:
        """`reader` will read these extents at that position of its plan. Policies that follow no plan ignore it (`auto`
        and `plan` do follow)."""
        with self._lock:
            for plans in self._accounts.plans:
                plans.expect(reader, position, names)

    def advance_plan(self, reader: str, position: int) -> None:
        """The reads of `reader` at positions below this one are done."""
        with self._lock:
            for plans in self._accounts.plans:
                plans.advance(reader, position)

    def forget_plan(self, reader: str) -> None:
        """That plan ended, or was given up."""
        with self._lock:
            for plans in self._accounts.plans:
                plans.forget(reader)

    @property
    def turnover_count(self) -> int:
        """How often something was evicted or refused; while it grows, what readers read decides what is kept."""
        return self._evicted_count + self._refused_count

    # -- writing ---------------------------------------------------------------------------------------------------

    def write_block(self, digest: str, size_bytes: int, block_index: int, data: Buffer) -> None:
        """Publish a block: when this returns, every process of the node can read it.

        Raises CacheFullError if there is no room (DiskFullError when the disk says so), OSError if the disk fails.
        """
        expected = self._geometry.block_range(size_bytes, block_index).length
        assert len(data) == expected, f"block {block_index} has {len(data)} bytes, not {expected}"
        name = self._name(digest, size_bytes, block_index)
        room = self._make_room(_charge(expected), name)
        try:
            self._write_or_evict(digest, size_bytes, block_index, data, room)
        except OSError as error:
            self._drop_unused(name)
            if error.errno in _FULL_ERRNOS:
                raise DiskFullError(f"the cache's disk is full: {error.strerror}") from error
            raise
        finally:
            with self._lock:
                self._settle(room)
        with self._lock:
            self._written += expected
            self._is_full_known = False

    def placing(self, digest: str, size_bytes: int, block_index: int) -> Placing:
        """Return what a block needs here that another process writes. Raises OSError, CacheFullError where something
        would have to leave first: that is for `write_block`."""
        return Placing(self, digest, size_bytes, block_index)

    def admits(
        self, digest: str, size_bytes: int, block_index: int, origin: Origin, *, is_asked_for: bool = False
    ) -> bool:
        """Whether that block, a version of `origin`, would be kept if it were written now: not if there is no room even
        after evicting what may leave, or what would have to is worth more (eviction). Remembers what it is told."""
        name = self._name(digest, size_bytes, block_index)
        charge = _charge(self._geometry.block_range(size_bytes, block_index).length)
        with self._lock:
            self._accounts.expect(digest, origin, is_asked_for=is_asked_for)
            if self._accounts.fits(charge, name):
                return True
            try:
                self._accounts.choose_victims(charge, self._busy() | {name}, name)
            except CacheFullError as error:
                self._refused_count += 1
                if not isinstance(error, NotAdmittedError) and not self._is_full_known:
                    self._is_full_known = True
                    log.warning("%s; reads go on, without being cached", error)
                return False
        return True

    def evict(self, size_bytes: int, *, keep: str = "") -> int:
        """Evict at least that many bytes (or all that may leave), whatever the accounts say about room: the disk
        itself said that it is full. Returns how many files went."""
        with self._lock:
            victims = self._accounts.choose_oldest(size_bytes, self._busy() | {keep})
            self._accounts.evict(Victims(of_all=victims))
            retired = [path for name in victims for path in self._retire(name)]
        self._files.unlink(retired)
        return len(retired)

    def _busy(self) -> set[str]:
        return {name for name, filling in self._filling.items() if filling.users}

    def _make_room(self, charge: int, name: str) -> _Room:
        """Reserve that much, evicting what has to leave."""
        retired: list[str] = []
        with self._lock:
            if not self._accounts.fits(charge, name):
                victims = self._accounts.choose_victims(charge, self._busy() | {name}, name)
                self._accounts.evict(victims)
                retired = [path for victim in victims for path in self._retire(victim)]
            room = self._reserve(charge, name)
        if retired:
            self._files.unlink(retired)
        return room

    def _reserve(self, charge: int, name: str) -> _Room:
        """Under the lock."""
        self._accounts.reserve(charge, name)
        return _Room(charge, self._accounts.origin_of(name))

    def _settle(self, room: _Room) -> None:
        """Under the lock: once, however often it is called."""
        if room.is_reserved:
            room.is_reserved = False
            self._accounts.settle(room.charge, room.owner)

    def _drop_unused(self, name: str) -> None:
        """Remove an extent that holds no block after a write that failed: nothing else would ever evict it."""
        with self._lock:
            filling = self._filling.get(name)
            is_unused = name not in self._accounts and not (filling and filling.users)
            retired = self._retire(name) if is_unused else []
        self._files.unlink(retired)

    def _write_or_evict(self, digest: str, size_bytes: int, block_index: int, data: Buffer, room: _Room) -> None:
        """Write; if the disk turns out to be full, or no file can be opened, make room and write again.

        Raises OSError.
        """
        try:
            self._write(digest, size_bytes, block_index, data, room)
        except OSError as error:
            name = self._name(digest, size_bytes, block_index)
            if error.errno in _NO_DESCRIPTOR_ERRNOS:
                self._close_idle()
            elif error.errno not in _FULL_ERRNOS or not self.evict(_EVICTED_AT_ONCE_BYTES + len(data), keep=name):
                raise
            self._write(digest, size_bytes, block_index, data, room)

    def _write(self, digest: str, size_bytes: int, block_index: int, data: Buffer, room: _Room) -> None:
        if self._geometry.is_small(size_bytes):
            with self._files.small_ready(digest, data) as temporary, self._lock:
                self._publish_small(digest, temporary.path, room)
            return
        crc = crc32c.crc32c(data)
        while not self._try_write_into_extent(digest, size_bytes, block_index, data, crc, room):
            log.info("extent of %s was removed while block %d was written; writing it again", digest, block_index)

    def _try_write_into_extent(
        self, digest: str, size_bytes: int, block_index: int, data: Buffer, crc: int, room: _Room
    ) -> bool:
        """Write and mark; False if the extent was removed meanwhile."""
        extent_index = block_index // self._geometry.blocks_per_extent
        name = f"{digest}.{extent_index}"
        filling = self._use_extent(digest, size_bytes, extent_index)
        try:
            offset = (block_index - filling.marks.header.first_block) * self._geometry.block_size_bytes
            self._files.write_at(filling.fd, data, offset)
            return self._mark(name, filling, block_index, crc, room)
        finally:
            self._let_go(name, filling)

    def _publish_small(self, digest: str, path: str, room: _Room) -> None:
        """Under the lock. Raises OSError."""
        self._files.publish_small(digest, path)
        if digest not in self._accounts:
            self._settle(room)
            self._accounts.grow(digest, room.charge)

    def _use_extent(self, digest: str, size_bytes: int, extent_index: int) -> _Filling:
        """Return the extent, open; it is not evicted before `_let_go`. Raises OSError."""
        with self._lock:
            name = f"{digest}.{extent_index}"
            filling = self._filling.get(name) or self._start_filling(digest, size_bytes, extent_index)
            filling.users += 1
            return filling

    def _mark(self, name: str, filling: _Filling, block_index: int, crc: int, room: _Room) -> bool:
        """Mark a block whose bytes are written; False if the extent was removed meanwhile."""
        with self._lock:
            if not filling.is_retired and not filling.marks.is_present(block_index):
                filling.marks.set_present(block_index, crc)
                self._settle(room)
                self._accounts.grow(name, room.charge)
                filling.absent_count -= 1
                if not filling.absent_count:
                    filling.marks.set_complete()
            return not filling.is_retired

    def _let_go(self, name: str, filling: _Filling) -> None:
        with self._lock:
            filling.users -= 1
            is_done = not filling.absent_count or len(self._filling) > self._open_extents_max
            if not filling.users and filling.is_retired:
                filling.close()
            elif not filling.users and is_done:
                self._stop_filling(name)

    def _start_filling(self, digest: str, size_bytes: int, extent_index: int) -> _Filling:
        name = f"{digest}.{extent_index}"
        filling = self._resume_extent(digest, size_bytes, extent_index)
        if filling is None:
            # A map of an earlier incarnation goes first.
            self._files.unlink(self._retire(name))
            fd, marks = self._files.new_extent(digest, size_bytes, extent_index)
            filling = _Filling(fd, marks, marks.header.block_count)
        self._filling[name] = filling
        return filling

    def _resume_extent(self, digest: str, size_bytes: int, extent_index: int) -> _Filling | None:
        opened = self._files.open_extent(digest, size_bytes, extent_index, os.O_RDWR)
        if opened is None:
            return None
        fd, marks = opened
        if marks.is_trusted(self._boot_id):
            present = marks.present_blocks()
            name = f"{digest}.{extent_index}"
            if name in self._accounts:
                # A recount charged what the file takes on disk. Bytes that a crash kept from being marked are among
                # that, and will be written and charged again.
                charge = sum(_charge(self._geometry.block_range(size_bytes, block).length) for block in present)
                self._accounts.grow(name, charge - self._accounts.size_of(name))
            return _Filling(fd, marks, marks.header.block_count - len(present))
        os.close(fd)
        marks.detach()
        return None

    def _close_idle(self) -> None:
        """Give back the descriptors of extents that wait for their next block; it opens them again."""
        with self._lock:
            for name in [name for name, filling in self._filling.items() if not filling.users]:
                self._stop_filling(name)

    def _stop_filling(self, name: str) -> None:
        filling = self._filling.pop(name)
        if filling.users:
            filling.is_retired = True
        else:
            filling.close()

    # -- removing --------------------------------------------------------------------------------------------------

    def remove(self, digest: str, size_bytes: int) -> int:
        """Drop what is held of an object (unless it is being filled); return the bytes freed."""
        freed = 0
        paths: list[str] = []
        with self._lock:
            for name in self.names_of(digest, size_bytes):
                filling = self._filling.get(name)
                if name in self._accounts and not (filling and filling.users):
                    freed += self._accounts.size_of(name)
                    paths += self._retire(name)
        self._files.unlink(paths)
        return freed

    def keep_limits(self) -> int:
        """Let leave what outlived its mount's ttl, and what is above a quota, the capacity or the free-space floor;
        return how many extents left. To be called from time to time: nobody needs to write for a limit to be passed."""
        with self._lock:
            busy = self._busy()
            expired = self._accounts.choose_expired(busy)
            retired = [path for name in expired for path in self._retire(name)]
            self._expired_count += len(expired)
            try:
                excess = self._accounts.choose_excess(busy)
            except OSError as error:  # the disk does not say how full it is: who writes next finds out
                log.warning("the cache's free space is not known: %s", error)
                excess = Victims()
            self._accounts.evict(excess)
            names = list(excess)
            retired += [path for name in names for path in self._retire(name)]
        self._files.unlink(retired)
        return len(expired) + len(names)

    def _drop(self, name: str) -> list[str]:
        """As `_retire`, but it counts as freed and not as evicted."""
        evicted, count = self._evicted, self._evicted_count
        paths = self._retire(name)
        self._evicted, self._evicted_count = evicted, count
        return paths

    def _retire(self, name: str) -> list[str]:
        """Make `name` invisible and uncounted, under the lock; return the paths to unlink outside it."""
        if name in self._filling:
            self._stop_filling(name)
        if name in self._accounts:
            self._evicted += self._accounts.remove(name)
            self._evicted_count += 1
            self.left_count += 1
        return self._files.set_aside(name)

    # -- verifying -------------------------------------------------------------------------------------------------

    def verify(self, digest: str, size_bytes: int, block_index: int, *, is_doubted: bool = False) -> int:
        """Check the file that holds the block against its checksums and vouch for it in this boot.

        A file with a bad block is dropped whole: readers may have it open (or mapped), so it is not mended in place.
        Returns how many blocks were bad (and counted): one where an extent cannot be opened, unless it `is_doubted`.
        """
        name = self._name(digest, size_bytes, block_index)
        if self._geometry.is_small(size_bytes):
            bad = int(self._files.verify_small(digest, size_bytes) is False)
        else:
            index = block_index // self._geometry.blocks_per_extent
            bad = self._files.count_bad_blocks(digest, size_bytes, index, if_unopened=int(not is_doubted))
        if not bad:
            return 0
        with self._lock:
            retired = self._retire(name)
            self._corrupt += bad
        self._files.unlink(retired)
        log.warning("dropped %s: %d damaged block(s); they will be fetched again", name, bad)
        return bad

    # -- life ------------------------------------------------------------------------------------------------------

    def recount(self) -> tuple[int, int]:
        """Bring the accounts in line with the files after an unclean stop; return (extents added, dropped)."""
        found = find_files(self._layout)
        for path in found.strangers:
            log.warning("%s is none of the cache's files and is left alone", path)
        self._files.unlink(found.halves)
        sizes = found.sizes
        with self._lock:
            gone = [name for name in self._accounts.names() if name not in sizes]
            for name in gone:
                self._accounts.remove(name)
            new = [name for name in sizes if name not in self._accounts]
            for name in new:
                self._accounts.grow(name, sizes[name])
            for name in self._accounts.names():
                difference = sizes[name] - self._accounts.size_of(name)
                if difference:
                    self._accounts.grow(name, difference)
        return len(new), len(gone)

    def flush(self) -> bool:
        """Write changed accounts to the index, by one thread at a time; False if that has to be tried again."""
        with self._lock:
            changes = self._accounts.take_changes()
        try:
            self._accounts.write_changes(changes)
        except IndexUnavailableError as error:
            with self._lock:
                self._accounts.put_back(changes)
            log.warning("%s; it will be tried again", error)
            return False
        return True

    def close(self) -> bool:
        """Close extents that are being filled, and flush; True if the index is exact now."""
        with self._lock:
            for name in list(self._filling):
                self._stop_filling(name)
        return self.flush()

    # -- names -----------------------------------------------------------------------------------------------------

    def _name(self, digest: str, size_bytes: int, block_index: int) -> str:
        if self._geometry.is_small(size_bytes):
            return digest
        return f"{digest}.{block_index // self._geometry.blocks_per_extent}"


def _charge(size_bytes: int) -> int:
    """Bytes that so much data takes on disk."""
    return -(-size_bytes // _PAGE_BYTES) * _PAGE_BYTES
