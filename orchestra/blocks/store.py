"""Writing, verifying and evicting blocks; the daemon's side of the cache directory.

Covers: publishing bytes so that a crash between any two system calls leaves either the right bytes or none; what is
held after a restart. Does not cover: reading (reader), fetching, which bytes to fetch (engine).

All methods are synchronous and touch only the local disk; they are thread-safe: bytes move outside the lock, names and
accounts change inside it.

A small object:  create tmp, write, seal, rename.             A name in extents/ is a whole object or does not exist.
An extent:       create tmp, set length, rename to .ext; create map tmp, write, rename to .map; then for every block
                 write the bytes, then mark. A mark in the map vouches for bytes written before it.
Eviction:        rename the map away, rename the extent away, unlink both. After the first step it is invisible.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import logging
import os
import threading
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import crc32c

from orchestra.blocks.accounts import Accounts, CacheFullError
from orchestra.blocks.disk import Buffer, Disk, LocalDisk
from orchestra.blocks.formats import SEAL_ATTRIBUTE, MapHeader, PresenceMap, Seal
from orchestra.blocks.geometry import Geometry
from orchestra.blocks.layout import CacheLayout
from orchestra.blocks.reader import LocalObject, open_map, read_seal

log = logging.getLogger(__name__)

_PAGE_BYTES = 4096
_FULL_ERRNOS = (errno.ENOSPC, errno.EDQUOT)
_NO_ATTRIBUTES_ERRNOS = (errno.ENOTSUP, errno.ENOSPC, errno.E2BIG)  # ext4 says ENOSPC when the inode has no room
# Extents kept open between two blocks of a fill; more than any window of streams needs, far below the fd limit.
_OPEN_EXTENTS_MAX = 128


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


class BlockStore:
    """The blocks of one cache directory, written by this process alone (the owner lock is the caller's business)."""

    def __init__(
        self, layout: CacheLayout, geometry: Geometry, accounts: Accounts, *, boot_id: bytes, disk: Disk | None = None
    ) -> None:
        self._layout = layout
        self._geometry = geometry
        self._accounts = accounts
        self._boot_id = boot_id
        self._disk = disk or LocalDisk()
        self._filling: dict[str, _Filling] = {}
        self._lock = threading.RLock()
        self._serial = itertools.count()
        self._attributes_work = True
        self._written = self._evicted = self._evicted_count = self._corrupt = 0

    def statistics(self) -> BlockStatistics:
        """Return a snapshot."""
        with self._lock:
            return BlockStatistics(
                self._accounts.used_bytes,
                len(self._accounts),
                self._written,
                self._evicted,
                self._evicted_count,
                self._corrupt,
            )

    def open_object(self, digest: str, size_bytes: int) -> LocalObject:
        """Return a reader of that object; the caller closes it."""
        return LocalObject(self._layout, self._geometry, digest, size_bytes, boot_id=self._boot_id)

    def holds(self, digest: str, size_bytes: int, block_index: int) -> bool:
        """Whether there is a file that may hold the block (of this boot or another)."""
        return self._name(digest, size_bytes, block_index) in self._accounts

    def touch(self, digest: str, block_index: int) -> None:
        """A reader read that block."""
        with self._lock:
            self._accounts.touch(digest)
            self._accounts.touch(f"{digest}.{block_index // self._geometry.blocks_per_extent}")

    # -- writing ---------------------------------------------------------------------------------------------------

    def write_block(self, digest: str, size_bytes: int, block_index: int, data: Buffer) -> None:
        """Publish a block: when this returns, every process of the node can read it.

        Raises CacheFullError if there is no room (also when the disk says so), OSError if the disk fails.
        """
        expected = self._geometry.block_range(size_bytes, block_index).length
        assert len(data) == expected, f"block {block_index} has {len(data)} bytes, not {expected}"
        charge = -(-expected // _PAGE_BYTES) * _PAGE_BYTES
        self._make_room(charge, keep=self._name(digest, size_bytes, block_index))
        try:
            if self._geometry.is_small(size_bytes):
                self._write_small(digest, data)
            else:
                self._write_into_extent(digest, size_bytes, block_index, data)
        except OSError as error:
            with self._lock:
                self._accounts.settle(charge)
            if error.errno in _FULL_ERRNOS:
                raise CacheFullError(f"the cache's disk is full: {error.strerror}") from error
            raise
        with self._lock:
            self._accounts.settle(charge)
            name = self._name(digest, size_bytes, block_index)
            if name not in self._accounts or not self._geometry.is_small(size_bytes):
                self._accounts.grow(name, charge)
            self._written += expected

    def _make_room(self, charge: int, *, keep: str) -> None:
        with self._lock:
            busy = {name for name, filling in self._filling.items() if filling.users}
            busy.add(keep)
            victims = self._accounts.choose_victims(charge, busy)
            retired = [path for name in victims for path in self._retire(name)]
            self._accounts.reserve(charge)
        self._unlink(retired)

    def _write_small(self, digest: str, data: Buffer) -> None:
        target = self._layout.small_file(digest)
        seal = Seal(self._boot_id, bytes.fromhex(digest), len(data), crc32c.crc32c(data))
        with self._temporary() as (temporary, fd):
            self._disk.write_at(fd, data, 0)
            self._seal(target, fd, seal)
            self._disk.rename(temporary, target)

    def _seal(self, target: str, fd: int, seal: Seal) -> None:
        """Attach the seal to the open file, or put it beside `target` where there are no extended attributes."""
        if self._attributes_work:
            try:
                self._disk.set_attribute(fd, SEAL_ATTRIBUTE, seal.pack())
                return
            except OSError as error:
                if error.errno not in _NO_ATTRIBUTES_ERRNOS:
                    raise
                self._attributes_work = False
                log.warning("the cache's file system has no extended attributes; seals go into files of their own")
        with self._temporary() as (temporary, side):
            self._disk.write_at(side, seal.pack(), 0)
            self._disk.rename(temporary, target + ".seal")

    @contextlib.contextmanager
    def _temporary(self) -> Iterator[tuple[str, int]]:
        """A new file in tmp/, closed at the end, and removed if it was not renamed."""
        path = f"{self._layout.tmp}/{os.getpid()}-{next(self._serial)}"
        fd = self._disk.create(path)
        try:
            yield path, fd
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(path)
            raise
        finally:
            self._disk.close(fd)

    def _write_into_extent(self, digest: str, size_bytes: int, block_index: int, data: Buffer) -> None:
        crc = crc32c.crc32c(data)
        while not self._try_write_into_extent(digest, size_bytes, block_index, data, crc):
            log.info("extent of %s was removed while block %d was written; writing it again", digest, block_index)

    def _try_write_into_extent(self, digest: str, size_bytes: int, block_index: int, data: Buffer, crc: int) -> bool:
        """Write and mark; False if the extent was removed meanwhile."""
        extent_index = block_index // self._geometry.blocks_per_extent
        name = f"{digest}.{extent_index}"
        with self._lock:
            filling = self._filling.get(name) or self._start_filling(digest, size_bytes, extent_index)
            filling.users += 1
        try:
            offset = (block_index - filling.marks.header.first_block) * self._geometry.block_size_bytes
            self._disk.write_at(filling.fd, data, offset)
            with self._lock:
                if not filling.is_retired and not filling.marks.is_present(block_index):
                    filling.marks.set_present(block_index, crc)
                    filling.absent_count -= 1
                    if not filling.absent_count:
                        filling.marks.set_complete()
                return not filling.is_retired
        finally:
            with self._lock:
                filling.users -= 1
                is_done = not filling.absent_count or len(self._filling) > _OPEN_EXTENTS_MAX
                if not filling.users and filling.is_retired:
                    filling.close()
                elif not filling.users and is_done:
                    self._stop_filling(name)

    def _start_filling(self, digest: str, size_bytes: int, extent_index: int) -> _Filling:
        name = f"{digest}.{extent_index}"
        filling = self._resume_extent(digest, size_bytes, extent_index)
        if filling is None:
            filling = self._new_extent(digest, size_bytes, extent_index)
        self._filling[name] = filling
        return filling

    def _resume_extent(self, digest: str, size_bytes: int, extent_index: int) -> _Filling | None:
        try:
            fd = os.open(self._layout.extent_file(digest, extent_index), os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
        except OSError:
            return None
        marks = open_map(self._layout.map_file(digest, extent_index), writable=True)
        length = self._geometry.extent_length(size_bytes, extent_index)
        if marks is not None and marks.is_trusted(self._boot_id) and _belong_together(fd, marks, length):
            return _Filling(fd, marks, marks.header.block_count - len(marks.present_blocks()))
        os.close(fd)
        if marks is not None:
            marks.detach()
        return None

    def _new_extent(self, digest: str, size_bytes: int, extent_index: int) -> _Filling:
        """Make the two files of an extent with no block present. A map of an earlier incarnation goes first."""
        self._unlink(self._retire(f"{digest}.{extent_index}"))
        length = self._geometry.extent_length(size_bytes, extent_index)
        with self._temporary() as (temporary, fd):
            self._disk.set_length(fd, length)
            inode = os.fstat(fd).st_ino
            self._disk.rename(temporary, self._layout.extent_file(digest, extent_index))
            kept_fd = os.dup(fd)
        header = MapHeader(
            block_size_bytes=self._geometry.block_size_bytes,
            first_block=extent_index * self._geometry.blocks_per_extent,
            block_count=self._geometry.block_count(length),
            extent_bytes=length,
            extent_inode=inode,
            digest=bytes.fromhex(digest),
        )
        map_path = self._layout.map_file(digest, extent_index)
        try:
            with self._temporary() as (temporary, fd):
                self._disk.write_at(fd, header.pack(), 0)
                self._disk.rename(temporary, map_path)
        except OSError:
            os.close(kept_fd)
            raise
        marks = open_map(map_path, writable=True)
        if marks is None:
            os.close(kept_fd)
            raise OSError(f"the presence map {map_path} vanished while it was made")
        marks.set_trusted(self._boot_id)
        return _Filling(kept_fd, marks, header.block_count)

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
            for name in self._names(digest, size_bytes):
                filling = self._filling.get(name)
                if name in self._accounts and not (filling and filling.users):
                    freed += self._accounts.size_of(name)
                    paths += self._retire(name)
        self._unlink(paths)
        return freed

    def _retire(self, name: str) -> list[str]:
        """Make `name` invisible and uncounted, under the lock; return the paths to unlink outside it.

        Renaming is quick and unlinking 256 MiB is not; and a file that is renamed first cannot be confused with its
        successor, which may be created before the unlink is done.
        """
        if name in self._filling:
            self._stop_filling(name)
        if name in self._accounts:
            self._evicted += self._accounts.remove(name)
            self._evicted_count += 1
        digest, _, extent_index = name.partition(".")
        if extent_index:
            paths = [
                self._layout.map_file(digest, int(extent_index)),
                self._layout.extent_file(digest, int(extent_index)),
            ]
        else:
            paths = [self._layout.small_file(digest)]
            if not self._attributes_work:
                paths.append(paths[0] + ".seal")
        retired = []
        for path in paths:
            target = f"{self._layout.tmp}/{os.getpid()}-{next(self._serial)}"
            with contextlib.suppress(FileNotFoundError):
                self._disk.rename(path, target)
                retired.append(target)
        return retired

    def _unlink(self, paths: Iterable[str]) -> None:
        for path in paths:
            try:
                self._disk.unlink(path)
            except OSError as error:
                log.warning("could not remove %s: %s", path, error)

    # -- verifying -------------------------------------------------------------------------------------------------

    def verify(self, digest: str, size_bytes: int, block_index: int) -> int:
        """Check the file that holds the block against its checksums and vouch for it in this boot.

        Bad blocks are dropped (and counted); returns how many. Reads the whole file.
        """
        if self._geometry.is_small(size_bytes):
            bad = self._verify_small(digest, size_bytes)
        else:
            bad = self._verify_extent(digest, size_bytes, block_index // self._geometry.blocks_per_extent)
        if bad:
            with self._lock:
                self._corrupt += bad
            log.warning("dropped %d damaged block(s) of cached object %s; they will be fetched again", bad, digest)
        return bad

    def _verify_small(self, digest: str, size_bytes: int) -> int:
        path = self._layout.small_file(digest)
        try:
            fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
        except FileNotFoundError:
            return 0
        except OSError:
            fd = -1
        good = False
        if fd >= 0:
            try:
                seal = read_seal(path, fd)
                if seal is not None and seal.size_bytes == size_bytes and seal.digest.hex() == digest:
                    data = os.pread(fd, size_bytes + 1, 0)
                    good = len(data) == size_bytes and crc32c.crc32c(data) == seal.crc
                    if good and seal.boot_id != self._boot_id:
                        self._seal(path, fd, Seal(self._boot_id, seal.digest, seal.size_bytes, seal.crc))
            except OSError as error:
                log.warning("cannot read cached object %s: %s", digest, error)
            finally:
                os.close(fd)
        if good:
            return 0
        with self._lock:
            paths = self._retire(digest)
        self._unlink(paths)
        return 1

    def _verify_extent(self, digest: str, size_bytes: int, extent_index: int) -> int:
        name = f"{digest}.{extent_index}"
        length = self._geometry.extent_length(size_bytes, extent_index)
        try:
            fd = os.open(self._layout.extent_file(digest, extent_index), os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        except OSError:
            fd = -1
        marks = open_map(self._layout.map_file(digest, extent_index), writable=True)
        try:
            if (
                fd >= 0
                and marks is not None
                and _belong_together(fd, marks, length)
                and marks.header.digest.hex() == digest
            ):
                return self._verify_marks(name, fd, marks)
        finally:
            if fd >= 0:
                os.close(fd)
            if marks is not None:
                marks.detach()
        with self._lock:
            held = name in self._accounts
            paths = self._retire(name)
        self._unlink(paths)
        return 1 if held else 0

    def _verify_marks(self, name: str, fd: int, marks: PresenceMap) -> int:
        block_size = self._geometry.block_size_bytes
        bad = []
        for block in marks.present_blocks():
            offset = (block - marks.header.first_block) * block_size
            data = os.pread(fd, min(block_size, marks.header.extent_bytes - offset), offset)
            if crc32c.crc32c(data) != marks.crc_of(block):
                bad.append(block)
        with self._lock:
            if bad:
                # Readers may have the extent open (or mapped by the kernel): its bytes are not mended in place. The
                # whole extent goes, and what was good in it is fetched again.
                self._unlink(self._retire(name))
            else:
                marks.set_trusted(self._boot_id)
        return len(bad)

    # -- life ------------------------------------------------------------------------------------------------------

    def recount(self) -> tuple[int, int]:
        """Bring the accounts in line with the files after an unclean stop; return (extents added, dropped)."""
        found: dict[str, int] = {}
        for number in range(256):
            found.update(self._scan(f"{self._layout.root}/extents/{number:02x}"))
        with self._lock:
            gone = [name for name in self._accounts.names() if name not in found]
            for name in gone:
                self._accounts.remove(name)
            new = [name for name in found if name not in self._accounts]
            for name in new:
                self._accounts.grow(name, found[name])
            for name in self._accounts.names():
                difference = found[name] - self._accounts.size_of(name)
                if difference:
                    self._accounts.grow(name, difference)
        return len(new), len(gone)

    def _scan(self, folder: str) -> dict[str, int]:
        """Return sizes by name of one folder's files; halves without their other half are removed."""
        names = {entry.name for entry in os.scandir(folder)}
        sizes: dict[str, int] = {}
        for name in names:
            path = f"{folder}/{name}"
            stem, _, suffix = name.rpartition(".")
            partner = {"ext": f"{stem}.map", "map": f"{stem}.ext", "seal": stem}.get(suffix)
            if partner is not None and partner not in names:
                self._unlink([path])
            elif suffix == "ext":
                sizes[stem] = os.stat(path, follow_symlinks=False).st_blocks * 512
            elif partner is None:
                sizes[name] = os.stat(path, follow_symlinks=False).st_blocks * 512
        return sizes

    def flush(self) -> None:
        """Write changed accounts to the index; one thread at a time."""
        with self._lock:
            changes = self._accounts.take_changes()
        self._accounts.write_changes(changes)

    def close(self) -> None:
        """Close extents that are being filled and flush."""
        with self._lock:
            for name in list(self._filling):
                self._stop_filling(name)
        self.flush()

    # -- names -----------------------------------------------------------------------------------------------------

    def _name(self, digest: str, size_bytes: int, block_index: int) -> str:
        if self._geometry.is_small(size_bytes):
            return digest
        return f"{digest}.{block_index // self._geometry.blocks_per_extent}"

    def _names(self, digest: str, size_bytes: int) -> list[str]:
        if self._geometry.is_small(size_bytes):
            return [digest]
        return [f"{digest}.{index}" for index in range(self._geometry.extent_count(size_bytes))]


def _belong_together(fd: int, marks: PresenceMap, length: int) -> bool:
    info = os.fstat(fd)
    return info.st_ino == marks.header.extent_inode and info.st_size == length == marks.header.extent_bytes
