"""The few system calls that change the cache directory, behind a door that tests can stand in.

Owns: the calls; a test gives its own `Disk` for a crash at the k-th call, a full disk, a failing one. Leaves to others:
what the bytes mean.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Protocol

from orchestra.clock import Clock

# How old the figures of a disk may be that room is reckoned by. In that time a fast disk takes 40 MB; whoever finds it
# full all the same evicts and writes again.
_USAGE_AGE_NS = 20_000_000

# Written by one call at most. The kernel makes a page of its cache as large as the call: 2 MiB come from memory that
# nobody used yet, which a virtual machine's host has to find first (measured there: 10 ms for a block of 4 MiB, 1.4 in
# calls of 256 KiB; in memory that was used before 1.1 and 1.3).
_WRITE_BYTES_MAX = 256 * 1024

Buffer = bytes | bytearray | memoryview


class Disk(Protocol):
    """What the block store does to the disk, one system call a method; all raise OSError."""

    def create(self, path: str) -> int: ...

    def write_at(self, fd: int, data: Buffer, offset: int) -> None: ...

    def set_length(self, fd: int, length: int) -> None: ...

    def set_attribute(self, fd: int, name: str, value: bytes) -> None: ...

    def close(self, fd: int) -> None: ...

    def rename(self, source: str, target: str) -> None: ...

    def unlink(self, path: str) -> None: ...


class LocalDisk:
    """The real thing."""

    def create(self, path: str) -> int:
        """Open a new file for writing; FileExistsError if there is one."""
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)

    def write_at(self, fd: int, data: Buffer, offset: int) -> None:
        """Write all of `data`, however many calls it takes."""
        view = memoryview(data)
        while view:
            count = os.pwrite(fd, view[:_WRITE_BYTES_MAX], offset)
            view = view[count:]
            offset += count

    def set_length(self, fd: int, length: int) -> None:
        """Make the file that long; what was not written reads as zeros and takes no space."""
        os.ftruncate(fd, length)

    def set_attribute(self, fd: int, name: str, value: bytes) -> None:
        """Set an extended attribute."""
        os.setxattr(fd, name, value)

    def close(self, fd: int) -> None:
        """Close."""
        os.close(fd)

    def rename(self, source: str, target: str) -> None:
        """Replace `target` by `source`, atomically."""
        os.rename(source, target)

    def unlink(self, path: str) -> None:
        """Remove a name."""
        os.unlink(path)


class RecentUsage:
    """How full a disk is, asked of it 50 times a second at most: `statvfs` for who asks with every block."""

    def __init__(self, statvfs: Callable[[], os.statvfs_result], clock: Clock) -> None:
        self._statvfs = statvfs
        self._clock = clock
        self._at_ns = 0
        self._found: os.statvfs_result | None = None

    def __call__(self) -> os.statvfs_result:
        """Return the figures, 20 ms old at most. Raises OSError."""
        now_ns = self._clock.now_ns()
        if self._found is None or now_ns - self._at_ns > _USAGE_AGE_NS:
            self._found = self._statvfs()
            self._at_ns = now_ns
        return self._found
