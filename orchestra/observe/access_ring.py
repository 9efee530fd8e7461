"""How readers tell the daemon what they read without sending a message: a small shared file each.

A reader appends fixed-size notes to its own ring and adds to totals; the daemon looks from time to time. A reader that
is faster than the daemon overwrites notes (they are hints: order of use, streams), never totals (they are counts).
A ring belongs to one process: after a fork the child makes its own. The reader holds a lock on its file, so the daemon
knows from the lock alone, whatever the pid namespace, that a reader is gone.
"""

from __future__ import annotations

import contextlib
import fcntl
import mmap
import os
import secrets
import struct
import threading
from dataclasses import dataclass

_HEADER = struct.Struct("<4sIQ")  # magic, format, notes written
_TOTALS = struct.Struct("<QQQQ")  # hits, hit bytes, misses, miss bytes
_NOTE = struct.Struct("<16sIIQ")  # digest, first block, block count, serial (0: never written)
_MAGIC = b"ORCA"
_FORMAT = 1
_TOTALS_OFFSET = 32
_NOTES_OFFSET = 64
# 2,048 notes: at 100,000 small reads a second the daemon must look every 20 ms to see all; it need not see all.
NOTES_COUNT = 2048
RING_SIZE_BYTES = _NOTES_OFFSET + NOTES_COUNT * _NOTE.size


@dataclass(frozen=True, slots=True)
class ReadTotals:
    """What readers read. A hit was served from this node's disk; a miss had to ask the daemon first."""

    hits: int = 0
    hit_bytes: int = 0
    misses: int = 0
    miss_bytes: int = 0

    def __add__(self, other: ReadTotals) -> ReadTotals:
        return ReadTotals(
            self.hits + other.hits,
            self.hit_bytes + other.hit_bytes,
            self.misses + other.misses,
            self.miss_bytes + other.miss_bytes,
        )

    def __sub__(self, other: ReadTotals) -> ReadTotals:
        return ReadTotals(
            self.hits - other.hits,
            self.hit_bytes - other.hit_bytes,
            self.misses - other.misses,
            self.miss_bytes - other.miss_bytes,
        )


@dataclass(frozen=True, slots=True)
class AccessNote:
    """One read: these blocks of the object with that digest."""

    digest: bytes
    first_block: int
    block_count: int


class AccessRing:
    """The writing side; thread-safe. Does nothing if the directory cannot be written (statistics are not worth an
    error)."""

    __slots__ = ("_count", "_fd", "_lock", "_map", "_totals")

    def __init__(self, directory: str) -> None:
        self._lock = threading.Lock()
        self._count = 0
        self._totals = [0, 0, 0, 0]
        self._map: mmap.mmap | None = None
        self._fd = -1
        name = f"{os.getpid()}-{secrets.token_hex(4)}"
        hidden = f"{directory}/.{name}"  # the daemon looks at it once it is whole and locked
        try:
            self._fd = os.open(hidden, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.posix_fallocate(self._fd, 0, RING_SIZE_BYTES)  # a hole would kill us (SIGBUS) on a full disk
            self._map = mmap.mmap(self._fd, RING_SIZE_BYTES)
            self._map[: _HEADER.size] = _HEADER.pack(_MAGIC, _FORMAT, 0)
            os.rename(hidden, f"{directory}/{name}")
        except OSError:
            with contextlib.suppress(OSError):
                os.unlink(hidden)
            self.abandon()

    def hit(self, digest: bytes, first_block: int, block_count: int, size_bytes: int) -> None:
        """Note a read that was served from this node's disk."""
        self._note(digest, first_block, block_count, size_bytes, 0)

    def miss(self, digest: bytes, first_block: int, block_count: int, size_bytes: int) -> None:
        """Note a read that had to ask the daemon."""
        self._note(digest, first_block, block_count, size_bytes, 2)

    def _note(self, digest: bytes, first_block: int, block_count: int, size_bytes: int, at: int) -> None:
        ring = self._map
        if ring is None:
            return
        with self._lock:
            serial = self._count + 1
            offset = _NOTES_OFFSET + (self._count % NOTES_COUNT) * _NOTE.size
            _NOTE.pack_into(ring, offset, digest, first_block, block_count, serial)
            totals = self._totals
            totals[at] += 1
            totals[at + 1] += size_bytes
            _TOTALS.pack_into(ring, _TOTALS_OFFSET, *totals)
            self._count = serial
            _HEADER.pack_into(ring, 0, _MAGIC, _FORMAT, serial)

    def abandon(self) -> None:
        """Let go of the file without removing it: the daemon still wants its last notes. Also what a forked child does
        with its parent's ring."""
        if self._map is not None:
            self._map.close()
            self._map = None
        if self._fd >= 0:
            with contextlib.suppress(OSError):
                os.close(self._fd)
            self._fd = -1


class AccessLog:
    """The daemon's side: all rings of one directory."""

    def __init__(self, directory: str) -> None:
        self._directory = directory
        self._open: dict[str, tuple[int, mmap.mmap, int]] = {}
        self._finished = ReadTotals()
        # Readers outlive daemons: what they read before is not of this one, whose other counts all begin at zero.
        self._before = ReadTotals()
        self._before = self.totals()

    def collect(self) -> list[AccessNote]:
        """Return the notes written since the last call, and remove the rings of readers that are gone."""
        self._discover()
        notes: list[AccessNote] = []
        for path, (fd, ring, seen) in list(self._open.items()):
            is_gone = _is_unlocked(fd)
            notes.extend(_read_notes(ring, seen))
            count = _HEADER.unpack_from(ring)[2]
            self._open[path] = (fd, ring, count)
            if is_gone:
                self._finished += _read_totals(ring)
                ring.close()
                os.close(fd)
                del self._open[path]
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(path)
        return notes

    def totals(self) -> ReadTotals:
        """Return what all readers, also those gone meanwhile, have read since the daemon's start."""
        self._discover()
        total = self._finished - self._before
        for _, ring, _ in self._open.values():
            total += _read_totals(ring)
        return total

    @property
    def readers_count(self) -> int:
        """How many rings are open."""
        return len(self._open)

    def close(self) -> None:
        """Let go of the rings; readers keep theirs for the next daemon."""
        for fd, ring, _ in self._open.values():
            ring.close()
            os.close(fd)
        self._open.clear()

    def _discover(self) -> None:
        for entry in os.scandir(self._directory):
            if entry.path in self._open or entry.name.startswith("."):
                continue
            try:
                fd = os.open(entry.path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
            except OSError:
                continue
            try:
                ring = mmap.mmap(fd, RING_SIZE_BYTES, access=mmap.ACCESS_READ)
            except (OSError, ValueError):  # not of its full length: not one of ours
                os.close(fd)
                continue
            magic, version, _ = _HEADER.unpack_from(ring)
            if magic != _MAGIC or version != _FORMAT:
                ring.close()
                os.close(fd)
                continue
            self._open[entry.path] = (fd, ring, 0)


def _is_unlocked(fd: int) -> bool:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    fcntl.flock(fd, fcntl.LOCK_UN)
    return True


def _read_totals(ring: mmap.mmap) -> ReadTotals:
    return ReadTotals(*_TOTALS.unpack_from(ring, _TOTALS_OFFSET))


def _read_notes(ring: mmap.mmap, seen: int) -> list[AccessNote]:
    count = _HEADER.unpack_from(ring)[2]
    notes = []
    for serial in range(max(seen, count - NOTES_COUNT), count):
        offset = _NOTES_OFFSET + (serial % NOTES_COUNT) * _NOTE.size
        digest, first, blocks, written = _NOTE.unpack_from(ring, offset)
        if written == serial + 1:  # else overwritten while we looked
            notes.append(AccessNote(digest, first, blocks))
    return notes
