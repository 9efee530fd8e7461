"""The few system calls that change the cache directory, behind a door that tests can stand in.

Owns: the calls; a test gives its own `Disk` for a crash at the k-th call, a full disk, a failing one. Leaves to others:
what the bytes mean.
"""

from __future__ import annotations

import os
from typing import Protocol

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
            count = os.pwrite(fd, view, offset)
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
