"""Reading an object's blocks from the cache directory; for any process, without a message to anybody.

Owns: the order of checks that makes a hit right. Leaves to others: what to do about a miss (client), writing (store).

A hit is right because
- a file's name is the digest of store, key and version, and its seal or map repeats that digest;
- seal and map name the boot that vouches for the bytes; another boot's are a miss, and the daemon verifies them;
- a map names the inode of its extent, and the extent is opened first: bytes and marks belong to one incarnation;
- a map names its blocks: the files of one extent under the name of another do not match;
- files are only ever unlinked, never cut or overwritten, so what is open stays valid.
"""

from __future__ import annotations

import mmap
import os
from dataclasses import dataclass

import crc32c

from orchestra.blocks.formats import (
    SEAL_ATTRIBUTE,
    SEAL_SIZE_BYTES,
    MapHeader,
    PresenceMap,
    Seal,
    pack_seal,
    unpack_seal,
)
from orchestra.blocks.geometry import Geometry
from orchestra.blocks.layout import CacheLayout
from orchestra.values import ByteRange

# A link or a FIFO in the place of a file must neither be followed nor hold us up.
OPEN_FLAGS = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
# An extent evicted and filled again between our two opens is seen as a mismatch; twice in a row means trouble.
_OPEN_TRIES_MAX = 4


class CorruptBlockError(Exception):
    """A block's bytes do not match their checksum; `block_index` says which. Never leaves the client."""

    def __init__(self, block_index: int) -> None:
        super().__init__(f"block {block_index} does not match its checksum")
        self.block_index = block_index


def read_seal(path: str, fd: int) -> Seal | None:
    """Return the seal of the small object open at `fd`, from its attribute or from the file beside it."""
    return unpack_seal(_raw_seal(path, fd))


def _raw_seal(path: str, fd: int) -> bytes:
    """The bytes of the seal, b"" if there is none."""
    try:
        return os.getxattr(fd, SEAL_ATTRIBUTE)
    except OSError:
        pass  # ENODATA or ENOTSUP: look beside it
    try:
        side = os.open(path + ".seal", OPEN_FLAGS)
    except OSError:
        return b""
    try:
        return os.read(side, SEAL_SIZE_BYTES + 1)
    except OSError:
        return b""  # a folder, or a disk that fails
    finally:
        os.close(side)


def read_small_file(path: str, digest: bytes, size_bytes: int, boot_id: bytes) -> bytes | None:
    """Return the whole small object in the file at `path` if it is here and right, in four calls to the kernel.

    Checked is what `LocalObject` checks: the seal's format, boot, digest, size and own checksum, the file's length, the
    checksum of the bytes. None if anything is amiss: `LocalObject` finds out what.
    """
    try:
        fd = os.open(path, OPEN_FLAGS)
    except OSError:
        return None
    try:
        # One byte more than there should be: a longer file is noticed without asking for its length.
        data = os.pread(fd, size_bytes + 1, 0)
        raw = _raw_seal(path, fd)
    except OSError:
        return None
    finally:
        os.close(fd)
    if len(data) != size_bytes or raw != pack_seal(boot_id, digest, size_bytes, crc32c.crc32c(data)):
        return None
    return data


def read_small_into(path: str, digest: bytes, size_bytes: int, boot_id: bytes, buffer: memoryview) -> int | None:
    """As `read_small_file`, into `buffer`, which has room for a byte more than the object; return the size or None.

    What is in the buffer after None means nothing.
    """
    try:
        fd = os.open(path, OPEN_FLAGS)
    except OSError:
        return None
    try:
        count = os.preadv(fd, [buffer[: size_bytes + 1]], 0)
        raw = _raw_seal(path, fd)
    except OSError:
        return None
    finally:
        os.close(fd)
    if count != size_bytes or raw != pack_seal(boot_id, digest, size_bytes, crc32c.crc32c(buffer[:size_bytes])):
        return None
    return count


def open_map(path: str, *, writable: bool = False) -> PresenceMap | None:
    """Map the presence map at `path`; None if it is missing or not intact."""
    try:
        fd = os.open(path, (os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW) if writable else OPEN_FLAGS)
    except OSError:
        return None
    try:
        size = os.fstat(fd).st_size
        if not size:
            return None
        raw = mmap.mmap(fd, size, access=mmap.ACCESS_WRITE if writable else mmap.ACCESS_READ)
    except (OSError, ValueError):
        return None
    finally:
        os.close(fd)
    marks = PresenceMap.attach(raw)
    if marks is None:
        raw.close()
    return marks


def map_header(geometry: Geometry, digest: str, size_bytes: int, extent_index: int, extent_inode: int) -> MapHeader:
    """Return the one header that the map of that extent may have."""
    length = geometry.extent_length(size_bytes, extent_index)
    return MapHeader(
        block_size_bytes=geometry.block_size_bytes,
        first_block=extent_index * geometry.blocks_per_extent,
        block_count=geometry.block_count(length),
        extent_bytes=length,
        extent_inode=extent_inode,
        digest=bytes.fromhex(digest),
    )


class _OpenFile:
    """An open extent with its marks, or an open small object with its seal. Closed by its owner."""

    __slots__ = ("fd", "marks", "seal")

    def __init__(self, fd: int, marks: PresenceMap | None, seal: Seal | None) -> None:
        self.fd = fd
        self.marks = marks
        self.seal = seal

    def close(self) -> None:
        os.close(self.fd)
        if self.marks is not None:
            self.marks.detach()


@dataclass(frozen=True, slots=True)
class FilePlace:
    """Bytes in an open file, and the checksum of each block of them."""

    fd: int
    offset: int
    length: int
    checksums: tuple[int, ...]


_SMALL = -1  # the key of a small object's one file among the extents


class LocalObject:
    """One object version's bytes on this node's disk; files are opened on first use.

    Thread-safe without a lock (single dict operations are atomic), so a fork can never inherit one that is held.
    """

    __slots__ = ("_boot_id", "_digest", "_files", "_geometry", "_layout", "_retired", "_size", "_verify_always")

    def __init__(
        self,
        layout: CacheLayout,
        geometry: Geometry,
        digest: str,
        size_bytes: int,
        *,
        boot_id: bytes,
        verify_always: bool = False,
    ) -> None:
        self._layout = layout
        self._geometry = geometry
        self._digest = digest
        self._size = size_bytes
        self._boot_id = boot_id
        self._verify_always = verify_always
        self._files: dict[int, _OpenFile] = {}
        # What `forget` replaced. Another thread may be inside preadv with such a descriptor, so it is closed with the
        # object and not before: a number given back to the kernel early could be somebody else's file by then.
        self._retired: list[_OpenFile] = []

    @property
    def block_size_bytes(self) -> int:
        """The size of its blocks."""
        return self._geometry.block_size_bytes

    def readinto(self, offset: int, buffer: memoryview) -> int | None:
        """Fill `buffer` from `offset` if every byte is here, else return None. Short only at the object's end.

        Raises CorruptBlockError when bytes that were checked do not match, or when the disk cannot read them.
        """
        wanted = min(len(buffer), self._size - offset)
        if wanted <= 0:
            return 0
        if wanted != len(buffer):
            buffer = buffer[:wanted]
        if self._geometry.is_small(self._size):
            return self._read_small(offset, buffer)
        return self._read_extents(offset, buffer)

    def read_small(self) -> bytes | None:
        """Return the whole of a small object without a copy, or None. Raises CorruptBlockError."""
        small = self._file(_SMALL)
        if small is None or small.seal is None:
            return None
        try:
            data = os.pread(small.fd, self._size, 0)
        except OSError as error:
            raise CorruptBlockError(0) from error
        if len(data) != self._size or crc32c.crc32c(data) != small.seal.crc:
            raise CorruptBlockError(0)
        return data

    def missing_blocks(self, byte_range: ByteRange) -> list[int]:
        """Return the blocks of the range that are not (trusted to be) here."""
        blocks = self._geometry.blocks_of(byte_range)
        if self._geometry.is_small(self._size):
            return [] if not blocks or self._file(_SMALL) is not None else list(blocks)
        missing: list[int] = []
        for extent_index, run in self._geometry.extents_of(blocks):
            extent = self._file(extent_index)
            if extent is None or extent.marks is None:
                missing.extend(run)
            elif not extent.marks.is_complete():
                missing.extend(block for block in run if not extent.marks.is_present(block))
        return missing

    def has_file(self, block_index: int) -> bool:
        """Whether the file that would hold the block is here and vouched for in this boot, with or without it."""
        if self._geometry.is_small(self._size):
            return self._file(_SMALL) is not None
        return self._file(block_index // self._geometry.blocks_per_extent) is not None

    def place_of(self, blocks: range) -> FilePlace | None:
        """Return where these blocks, all of one extent, lie in a local file, with their checksums; None unless all are
        here. The descriptor is this object's: it lives until `close`."""
        if self._geometry.is_small(self._size):
            small = self._file(_SMALL)
            if small is None or small.seal is None:
                return None
            return FilePlace(small.fd, 0, self._size, (small.seal.crc,))
        index = blocks.start // self._geometry.blocks_per_extent
        extent = self._file(index)
        if extent is None or extent.marks is None or not all(extent.marks.is_present(block) for block in blocks):
            return None
        start = self._geometry.block_range(self._size, blocks.start).start
        stop = self._geometry.block_range(self._size, blocks.stop - 1).stop
        checksums = tuple(extent.marks.crc_of(block) for block in blocks)
        return FilePlace(extent.fd, start - index * self._geometry.extent_size_bytes, stop - start, checksums)

    def cached_bytes(self) -> int:
        """How many of the object's bytes are here."""
        missing = self.missing_blocks(ByteRange(0, self._size))
        return self._size - sum(self._geometry.block_range(self._size, block).length for block in missing)

    def complete_fd(self) -> int | None:
        """Return the descriptor of the one local file that holds exactly this object, or None. Ours to close."""
        if not self._size or self._verify_always:
            return None
        if self._geometry.is_small(self._size):
            small = self._file(_SMALL)
            return small.fd if small is not None else None
        if self._geometry.extent_count(self._size) != 1:
            return None
        extent = self._file(0)
        return extent.fd if extent is not None and extent.marks is not None and extent.marks.is_complete() else None

    def forget(self) -> None:
        """Drop files that were evicted meanwhile, so that the next read sees their successors."""
        for index, file in list(self._files.items()):
            if os.fstat(file.fd).st_nlink == 0 and self._files.pop(index, None) is file:
                self._retired.append(file)

    def close(self) -> None:
        """Release descriptors; nobody reads any more. Idempotent."""
        while self._files:
            self._retired.append(self._files.popitem()[1])
        while self._retired:
            self._retired.pop().close()

    def _file(self, index: int) -> _OpenFile | None:
        file = self._files.get(index)
        if file is not None:
            return file
        opened = self._open_small() if index == _SMALL else self._open_extent(index)
        if opened is None:
            return None
        file = self._files.setdefault(index, opened)
        if file is not opened:  # another thread was quicker
            opened.close()
        return file

    def _open_small(self) -> _OpenFile | None:
        path = self._layout.small_file(self._digest)
        try:
            fd = os.open(path, OPEN_FLAGS)
        except OSError:
            return None
        seal = read_seal(path, fd)
        if (
            seal is None
            or seal.boot_id != self._boot_id
            or seal.size_bytes != self._size
            or seal.digest.hex() != self._digest
            or os.fstat(fd).st_size != self._size
        ):
            os.close(fd)
            return None
        return _OpenFile(fd, None, seal)

    def _open_extent(self, extent_index: int) -> _OpenFile | None:
        for _ in range(_OPEN_TRIES_MAX):
            try:
                fd = os.open(self._layout.extent_file(self._digest, extent_index), OPEN_FLAGS)
            except OSError:
                return None
            marks = open_map(self._layout.map_file(self._digest, extent_index))
            if marks is None:
                os.close(fd)
                return None
            opened = _OpenFile(fd, marks, None)
            info = os.fstat(fd)
            expected = map_header(self._geometry, self._digest, self._size, extent_index, info.st_ino)
            if marks.header == expected and info.st_size == expected.extent_bytes:
                if marks.is_trusted(self._boot_id):
                    return opened
                opened.close()
                return None
            opened.close()
        return None

    def _read_small(self, offset: int, buffer: memoryview) -> int | None:
        small = self._file(_SMALL)
        if small is None or small.seal is None:
            return None
        try:
            count = os.preadv(small.fd, [buffer], offset)
        except OSError as error:
            raise CorruptBlockError(0) from error
        if count != len(buffer):
            raise CorruptBlockError(0)
        if count == self._size:  # the whole object: its checksum costs 5 us for 110 kB
            if crc32c.crc32c(buffer) != small.seal.crc:
                raise CorruptBlockError(0)
        elif self._verify_always:
            _verify(small.fd, 0, ByteRange(0, self._size), small.seal.crc)
        return count

    def _read_extents(self, offset: int, buffer: memoryview) -> int | None:
        stop = offset + len(buffer)
        position = offset
        extent_size = self._geometry.extent_size_bytes
        while position < stop:
            index = position // extent_size
            extent = self._file(index)
            if extent is None or extent.marks is None:
                return None
            piece_stop = min(stop, (index + 1) * extent_size)
            blocks = self._geometry.blocks_of(ByteRange(position, piece_stop))
            marks = extent.marks
            if not marks.is_complete() and not all(marks.is_present(block) for block in blocks):
                return None
            view = buffer[position - offset : piece_stop - offset]
            try:
                count = os.preadv(extent.fd, [view], position - index * extent_size)
            except OSError as error:
                raise CorruptBlockError(blocks.start) from error
            if count != len(view):
                raise CorruptBlockError(blocks.start)
            if self._verify_always:
                for block in blocks:
                    whole = self._geometry.block_range(self._size, block)
                    start = whole.start - index * extent_size
                    _verify(extent.fd, block, ByteRange(start, start + whole.length), marks.crc_of(block))
            position = piece_stop
        return len(buffer)


def _verify(fd: int, block: int, file_range: ByteRange, crc: int) -> None:
    try:
        data = os.pread(fd, file_range.length, file_range.start)
    except OSError as error:
        raise CorruptBlockError(block) from error
    if crc32c.crc32c(data) != crc:
        raise CorruptBlockError(block)
