"""The files of the cache directory, made and removed in steps that a crash may come between.

Owns: the order of the system calls, so that after any of them there are the right bytes or none. Leaves to others: how
much there may be and what leaves (accounts), threads and extents under way (store), reading (reader).

A small object:  create tmp, write, seal, rename.             A name in extents/ is a whole object or does not exist.
An extent:       create tmp, set length, rename to .ext; create map tmp, write, rename to .map; then for every block
                 write the bytes, then mark. A mark in the map vouches for bytes written before it.
Removal:         rename the map away, rename the extent away, unlink both. After the first step it is invisible.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import logging
import os
from collections.abc import Iterable
from typing import Self

import crc32c

from orchestra.blocks.disk import Buffer, Disk
from orchestra.blocks.formats import SEAL_ATTRIBUTE, PresenceMap, Seal
from orchestra.blocks.geometry import Geometry
from orchestra.blocks.layout import REMOVED_SUFFIX, CacheLayout
from orchestra.blocks.reader import map_header, open_map, read_seal

log = logging.getLogger(__name__)

_NO_ATTRIBUTES_ERRNOS = (errno.ENOTSUP, errno.ENOSPC, errno.E2BIG)  # ext4 says ENOSPC when the inode has no room


class _Temporary:
    """A new file in tmp/, closed at the end of a `with`, and removed if it was not renamed."""

    __slots__ = ("_disk", "fd", "path")

    def __init__(self, disk: Disk, path: str) -> None:
        self._disk = disk
        self.path = path
        self.fd = disk.create(path)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: object) -> None:
        if kind is None:
            self._disk.close(self.fd)
        else:
            self.give_up()

    def give_up(self) -> None:
        """Remove and close it."""
        try:
            with contextlib.suppress(OSError):
                os.unlink(self.path)
        finally:
            self._disk.close(self.fd)


class BlockFiles:
    """The daemon's hands on one cache directory. Thread-safe as long as no two calls are about one name."""

    def __init__(self, layout: CacheLayout, geometry: Geometry, *, boot_id: bytes, disk: Disk) -> None:
        self._layout = layout
        self._geometry = geometry
        self._boot_id = boot_id
        self._disk = disk
        self._serial = itertools.count()
        self._pid = os.getpid()
        self._attributes_work = True

    # -- small objects ---------------------------------------------------------------------------------------------

    def small_ready(self, digest: str, data: Buffer) -> _Temporary:
        """Write a whole small object, which `publish_small` then puts in place. Raises OSError."""
        seal = Seal(self._boot_id, bytes.fromhex(digest), len(data), crc32c.crc32c(data))
        temporary = self._temporary()
        try:
            self._disk.write_at(temporary.fd, data, 0)
            self._seal(digest, temporary.fd, seal)
        except BaseException:
            temporary.give_up()
            raise
        return temporary

    def publish_small(self, digest: str, path: str) -> None:
        """Put a small object, ready at `path`, in its place. Raises OSError."""
        target = self._layout.small_file(digest)
        try:
            self._disk.rename(path, target)
        except IsADirectoryError:  # somebody's folder in the place of our file
            self.unlink(self.set_aside(digest))
            self._disk.rename(path, target)

    def verify_small(self, digest: str, size_bytes: int) -> bool | None:
        """Check the bytes against the seal, and seal them for this boot; None if there is no such file."""
        path = self._layout.small_file(digest)
        try:
            fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
        except FileNotFoundError:
            return None
        except OSError:
            return False
        try:
            seal = read_seal(path, fd)
            if seal is None or seal.size_bytes != size_bytes or seal.digest.hex() != digest:
                return False
            data = os.pread(fd, size_bytes + 1, 0)
            if len(data) != size_bytes or crc32c.crc32c(data) != seal.crc:
                return False
            if seal.boot_id != self._boot_id:
                self._seal(digest, fd, Seal(self._boot_id, seal.digest, seal.size_bytes, seal.crc))
            return True
        except OSError as error:
            log.warning("cannot read cached object %s: %s", digest, error)
            return False
        finally:
            os.close(fd)

    def _seal(self, digest: str, fd: int, seal: Seal) -> None:
        """Attach the seal to the open file, or put it beside the object's place where there are no such attributes."""
        if self._attributes_work:
            try:
                self._disk.set_attribute(fd, SEAL_ATTRIBUTE, seal.pack())
                return
            except OSError as error:
                if error.errno not in _NO_ATTRIBUTES_ERRNOS:
                    raise
                self._attributes_work = False
                log.warning("the cache's file system has no extended attributes; seals go into files of their own")
        with self._temporary() as temporary:
            self._disk.write_at(temporary.fd, seal.pack(), 0)
            self._disk.rename(temporary.path, self._layout.small_file(digest) + ".seal")

    # -- extents ---------------------------------------------------------------------------------------------------

    def open_extent(
        self, digest: str, size_bytes: int, extent_index: int, access: int
    ) -> tuple[int, PresenceMap] | None:
        """Open the two files of an extent; None unless both are there and belong together."""
        try:
            # O_NONBLOCK: a FIFO in the file's place must not hold us up.
            flags = access | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
            fd = os.open(self._layout.extent_file(digest, extent_index), flags)
        except OSError:
            return None
        marks = open_map(self._layout.map_file(digest, extent_index), writable=True)
        if marks is not None:
            info = os.fstat(fd)
            expected = map_header(self._geometry, digest, size_bytes, extent_index, info.st_ino)
            if marks.header == expected and info.st_size == expected.extent_bytes:
                return fd, marks
            marks.detach()
        os.close(fd)
        return None

    def new_extent(self, digest: str, size_bytes: int, extent_index: int) -> tuple[int, PresenceMap]:
        """Make the two files of an extent with no block present, where there are none. Raises OSError."""
        with self._temporary() as temporary:
            header = map_header(self._geometry, digest, size_bytes, extent_index, os.fstat(temporary.fd).st_ino)
            self._disk.set_length(temporary.fd, header.extent_bytes)
            self._disk.rename(temporary.path, self._layout.extent_file(digest, extent_index))
        with self._temporary() as temporary:
            self._disk.write_at(temporary.fd, header.pack(), 0)
            self._disk.rename(temporary.path, self._layout.map_file(digest, extent_index))
        opened = self.open_extent(digest, size_bytes, extent_index, os.O_RDWR)
        if opened is None:
            raise OSError(errno.EIO, f"extent {digest}.{extent_index} vanished while it was made")
        opened[1].set_trusted(self._boot_id)
        return opened

    def write_placed(self, digest: str, extent_index: int, inode: int, data: Buffer, offset: int) -> None:
        """Write into the extent whose file has that inode. Raises OSError, FileNotFoundError where it was removed."""
        flags = os.O_WRONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
        fd = os.open(self._layout.extent_file(digest, extent_index), flags)
        try:
            if os.fstat(fd).st_ino != inode:
                raise FileNotFoundError(errno.ENOENT, "the extent was removed")
            self._disk.write_at(fd, data, offset)
        finally:
            os.close(fd)

    def write_at(self, fd: int, data: Buffer, offset: int) -> None:
        """Write into an open extent. Raises OSError."""
        self._disk.write_at(fd, data, offset)

    def count_bad_blocks(self, digest: str, size_bytes: int, extent_index: int, *, if_unopened: int) -> int:
        """Check all present blocks of an extent against their checksums, and vouch for them in this boot if all match;
        return how many do not, `if_unopened` for files that cannot be opened or do not belong together."""
        opened = self.open_extent(digest, size_bytes, extent_index, os.O_RDONLY)
        if opened is None:
            return if_unopened
        fd, marks = opened
        try:
            bad = sum(not _is_block_good(fd, marks, block) for block in marks.present_blocks())
            if not bad:
                marks.set_trusted(self._boot_id)
            return bad
        finally:
            os.close(fd)
            marks.detach()

    # -- removal ---------------------------------------------------------------------------------------------------

    def set_aside(self, name: str) -> list[str]:
        """Make a small object or extent invisible; return the paths that `unlink` is to get.

        Renaming is quick and unlinking 256 MiB is not; and a file that is renamed first cannot be confused with its
        successor, which may be created before the unlink is done.
        """
        digest, _, extent_index = name.partition(".")
        if extent_index:
            paths = [
                self._layout.map_file(digest, int(extent_index)),
                self._layout.extent_file(digest, int(extent_index)),
            ]
        else:
            path = self._layout.small_file(digest)
            paths = [path, path + ".seal"]
        return [target for path in paths if (target := self._move_to_tmp(path)) is not None]

    def unlink(self, paths: Iterable[str]) -> None:
        """Remove files; what cannot be removed is said in the log."""
        for path in paths:
            try:
                self._disk.unlink(path)
            except OSError as error:
                log.warning("could not remove %s: %s", path, error)

    def _move_to_tmp(self, path: str) -> str | None:
        target = self._temporary_path() + REMOVED_SUFFIX
        try:
            self._disk.rename(path, target)
        except FileNotFoundError:
            return None
        except OSError as error:
            # On a full disk tmp/ may have no room for another name.
            log.warning("could not move %s to tmp (%s); removing it at once", path, error)
            self.unlink([path])
            return None
        return target

    # -- temporary files -------------------------------------------------------------------------------------------

    def _temporary_path(self) -> str:
        return f"{self._layout.prefix}/tmp/{self._pid}-{next(self._serial)}"

    def _temporary(self) -> _Temporary:
        return _Temporary(self._disk, self._temporary_path())


def _is_block_good(fd: int, marks: PresenceMap, block: int) -> bool:
    header = marks.header
    offset = (block - header.first_block) * header.block_size_bytes
    try:
        data = os.pread(fd, min(header.block_size_bytes, header.extent_bytes - offset), offset)
    except OSError as error:
        log.warning("cannot read a cached extent: %s", error)
        return False
    return crc32c.crc32c(data) == marks.crc_of(block)
