"""How the daemon tells other processes that something is not any more what it was: a small file, written in a circle.

Owns: the file's format, and waiting for more of it (inotify: nobody looks while nothing changes). Leaves to others:
what has changed (catalog, mount table), and what to do about it (a mount tells the kernel). A reader that is slow loses
the oldest notes, notices that, and takes everything for changed.
"""

from __future__ import annotations

import ctypes
import enum
import logging
import os
import select
import struct
import threading
from collections.abc import Iterable
from dataclasses import dataclass

log = logging.getLogger(__name__)

_MAGIC = b"ORCC\1\0\0\0"
_TOTAL = struct.Struct("<Q")  # bytes ever written; behind the magic
_TOTAL_AT = 8
_DATA_AT = 64
# 5,000 notes of long keys. A reader that is so far behind walks what it knows instead.
RING_BYTES = 1 << 20
_NOTE = struct.Struct("<HB")  # length of the text, kind
_IN_MODIFY, _IN_ATTRIB, _IN_MOVE_SELF = 0x2, 0x4, 0x800
_EVENT_BYTES_MAX = 4096


class Scope(enum.IntEnum):
    """How much of the tree a change is about. The numbers are in the file."""

    KEY = 1  # this key of the store
    CHILDREN = 2  # what lies directly in this prefix ("" or ending with "/") of the store
    PATH = 3  # this path of the namespace
    BELOW = 4  # this path and everything below it


@dataclass(frozen=True, slots=True)
class Change:
    """One note; `store_id` is "" where `name` is a path of the namespace."""

    scope: Scope
    store_id: str
    name: str


EVERYTHING = Change(Scope.BELOW, "", "/")


class ChangeLog:
    """The writing side: the daemon's. Thread-safe. A disk that does not take a note costs readers their freshness."""

    def __init__(self, path: str) -> None:
        """Takes up the log at `path`, or begins one; without a place for it nobody is told anything."""
        self._lock = threading.Lock()
        self._fd = -1
        self._total = 0
        try:
            self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
            total = _total_in(os.pread(self._fd, _DATA_AT, 0))
            if total is None or os.fstat(self._fd).st_size != _DATA_AT + RING_BYTES:
                os.ftruncate(self._fd, _DATA_AT + RING_BYTES)
                os.pwrite(self._fd, _MAGIC + _TOTAL.pack(0), 0)
            else:
                self._total = total
        except OSError as error:
            log.warning("mounts will not be told of changes: %s", error)
            self.close()

    def note(self, changes: Iterable[Change]) -> None:
        """Tell every reader."""
        data = b"".join(_packed(change) for change in changes)
        with self._lock:
            if not data or self._fd < 0:
                return
            if len(data) <= RING_BYTES:  # else every reader finds itself behind, which is what it is
                start = self._total % RING_BYTES
                first = data[: RING_BYTES - start]
                pieces = [(first, start), (data[len(first) :], 0)]
            else:
                pieces = []
            self._total += len(data)
            try:
                for piece, at in pieces:
                    os.pwrite(self._fd, piece, _DATA_AT + at)
                os.pwrite(self._fd, _TOTAL.pack(self._total), _TOTAL_AT)
            except OSError as error:
                log.warning("mounts are not told of a change: %s", error)

    def close(self) -> None:
        """Let go of the file. Idempotent."""
        with self._lock:
            fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)


class ChangeReader:
    """One reader's place in the log. `wait` is called by one thread; `close` by any.

    Raises OSError if there is no log, or the kernel has no watch left.
    """

    def __init__(self, path: str, position: int | None = None) -> None:
        """`position`: where an earlier reader was; None: what changes from now on."""
        self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        self._watch = self._closed = -1
        try:
            self._watch = _watch(path)
            self._closed = os.eventfd(0, os.EFD_CLOEXEC)
        except BaseException:
            self._close_all()
            raise
        self.position = self._written() if position is None else position

    def wait(self) -> list[Change] | None:
        """Wait for changes and return them; None when there will be no more: closed, or the log is gone."""
        if self._fd < 0:
            return None
        poll = select.poll()
        poll.register(self._watch, select.POLLIN)
        poll.register(self._closed, select.POLLIN)
        while True:
            changes = self._read()
            if changes:
                return changes
            if not os.fstat(self._fd).st_nlink or self._closed in {fd for fd, _ in poll.poll()}:
                self._close_all()
                return None
            os.read(self._watch, _EVENT_BYTES_MAX)

    def close(self) -> None:
        """Have `wait` return None."""
        os.eventfd_write(self._closed, 1)

    def _close_all(self) -> None:
        for fd in (self._fd, self._watch, self._closed):
            if fd >= 0:
                os.close(fd)
        self._fd = self._watch = -1

    def _written(self) -> int:
        return _total_in(os.pread(self._fd, _DATA_AT, 0)) or 0

    def _read(self) -> list[Change]:
        total = self._written()
        if total == self.position:
            return []
        begin, self.position = self.position, total
        if not 0 <= total - begin <= RING_BYTES:
            return [EVERYTHING]
        start = begin % RING_BYTES
        first = min(total - begin, RING_BYTES - start)
        data = os.pread(self._fd, first, _DATA_AT + start) + os.pread(self._fd, total - begin - first, _DATA_AT)
        if self._written() - begin > RING_BYTES:  # overwritten while it was read
            return [EVERYTHING]
        try:
            return _unpacked(data)
        except (ValueError, struct.error):
            log.warning("the log of changes cannot be understood; everything is taken for changed")
            return [EVERYTHING]


def _total_in(head: bytes) -> int | None:
    if len(head) < _DATA_AT or not head.startswith(_MAGIC):
        return None
    return int(_TOTAL.unpack_from(head, _TOTAL_AT)[0])


def _packed(change: Change) -> bytes:
    text = f"{change.store_id}\0{change.name}".encode("utf-8", "surrogateescape")[:0xFFFF]
    return _NOTE.pack(len(text), change.scope) + text


def _unpacked(data: bytes) -> list[Change]:
    found = []
    at = 0
    while at < len(data):
        length, scope = _NOTE.unpack_from(data, at)
        at += _NOTE.size
        store_id, _, name = data[at : at + length].decode("utf-8", "surrogateescape").partition("\0")
        found.append(Change(Scope(scope), store_id, name))
        at += length
    return found


def _watch(path: str) -> int:
    """Return an inotify descriptor that is readable when the file was written or lost a name."""
    libc = ctypes.CDLL(None, use_errno=True)
    fd = int(libc.inotify_init1(os.O_CLOEXEC))
    if fd >= 0:
        mask = ctypes.c_uint32(_IN_MODIFY | _IN_ATTRIB | _IN_MOVE_SELF)
        if libc.inotify_add_watch(fd, os.fsencode(path), mask) >= 0:
            return fd
        os.close(fd)
    raise OSError(ctypes.get_errno(), "no inotify watch", path)
